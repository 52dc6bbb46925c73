// What AddressSanitizer knows of working memory (csrc/memory.h): the fault that is named, on a block of three pieces.
#include <cstdio>
#include <cstring>

#include "memory.h"

namespace {

struct Pieces {
  explicit Pieces(condense::Memory memory) : first(memory.take<float>(5)), second(memory.take<double>(16)) {}
  float* first;
  double* second;
};

template <class T>
int read(const T* at) {
  return static_cast<int>(*static_cast<const volatile T*>(at));
}

}  // namespace

int main(int, char** arguments) {
  using namespace condense;
  const auto is = [fault = arguments[1]](const char* name) { return std::strcmp(fault, name) == 0; };
  Memory counted;
  for (int i = 0; i < 2; ++i) counted.take<double>(16);
  const float* kept = nullptr;
  int sum = 0;
  for (const int64_t bytes : {counted.taken() + 1000, int64_t{9} << 20}) {  // of the C library, and pages of its own
    char* caller = new char[bytes + Memory::kLine];
    const auto start = (reinterpret_cast<uintptr_t>(caller) + Memory::kLine - 1) / Memory::kLine * Memory::kLine;
    {
      const Workspace own(bytes), given(reinterpret_cast<void*>(start), bytes);
      for (const Workspace* workspace : {&own, &given}) {
        const Pieces large(workspace->piece(0, bytes));
        std::memset(large.second, 0, 16 * sizeof(double));
        std::memset(large.first, 0, 5 * sizeof(float));
        sum += read(large.first + 4) + read(large.second + 15);
        if (is("beyond a piece")) sum += read(large.first + 5);
        if (is("beyond a whole line")) sum += read(large.second + 16);
        if (is("before a piece")) sum += read(large.second - 1);
        if (is("slack of the block")) sum += read(reinterpret_cast<char*>(large.first) + bytes - 1);
        Memory again = workspace->piece(0, bytes);
        again.take<float>(1);
        if (is("of the image before")) sum += read(large.second);
        kept = large.first;
      }
    }
    for (int64_t i = 0; i < bytes; ++i) sum += read(caller + i) == 77;  // the caller's again, all of it
    delete[] caller;
  }
  if (is("a call's end")) {
    {
      const Workspace own(640);
      kept = own.piece(0, 640).take<float>(8);
    }
    sum += read(kept);
  }
  std::printf("%d\n", sum);
}
