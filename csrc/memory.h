// The working memory of a call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "sanitizers.h"

namespace condense {

// For a thing of `count` parts of `size` bytes each; a product beyond int64 is said to be what int64 can hold.
inline int64_t bytes_of(int64_t count, int64_t size) {
  int64_t bytes;
  return __builtin_mul_overflow(count, size, &bytes) ? std::numeric_limits<int64_t>::max() : bytes;
}

[[noreturn]] inline void fail_to_allocate(int64_t bytes, const std::string& what) {
  throw std::runtime_error("could not allocate " + std::to_string(bytes) +
                           (bytes == std::numeric_limits<int64_t>::max() ? " or more" : "") + " bytes " + what +
                           ". Remedy: fewer images a call, fewer tokens kept, or smaller windows.");
}

// An empty list that has room for n; `what` they are.
template <class T>
std::vector<T> list_of(int64_t n, const std::string& what) {
  std::vector<T> list;
  try {
    list.reserve(n);
  } catch (const std::exception&) {  // bad_alloc, length_error
    fail_to_allocate(bytes_of(n, sizeof(T)), what);
  }
  return list;
}

// Bytes on a cache line, on a page of 2 MB where they are many.
struct Block {
  void* data;
  size_t size;
};

// Blocks that calls give back are kept for the next ones, of all threads: the C library gives blocks of this size back
// to the system, and faulting their pages in again took up to three quarters of a call's time.
Block take_block(size_t bytes);  // at least so many; throws bad_alloc
void give_block(Block block) noexcept;

// A result that is about to be written, and so large that the C library has mapped it: the pages that lie inside of it
// become huge ones, where the system gives them.
void on_huge_pages(void* data, size_t bytes) noexcept;

// Hands out the pieces of one block, uninitialised, each on a cache line of its own; null for none. Without a block it
// counts: the code that takes the pieces is also what says how many bytes they are.
class Memory {
 public:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kTooMuch = int64_t{1} << 50;  // no machine has it, and the sum of many still fits

  Memory() = default;
  Memory(char* block, int64_t size) : block_(block), size_(size) {}
  template <class T>
  T* take(int64_t n, int64_t times = 1) {
    const int64_t start = at_, bytes = std::min(bytes_of(bytes_of(n, times), sizeof(T)), kTooMuch);
    taken_ = std::max(taken_, start + (bytes + kLine - 1) / kLine * kLine);
    at_ = start + (bytes + kLine - 1) / kLine * kLine + (bytes > 0 ? kRedZone : 0);
    if (!block_ || n == 0) return nullptr;
    if (taken_ > size_) throw std::logic_error("condense: a kernel took more memory than it had counted.");
    if (start == 0) forbid(block_, size_);
    hand_out(block_ + start, bytes);
    return reinterpret_cast<T*>(block_ + start);
  }
  int64_t taken() const { return taken_; }

  // From here on take what was taken since `at` once more: nobody needs that any longer.
  int64_t at() const { return at_; }
  Memory& rewound(int64_t at) {
    if (kRedZone == 0) at_ = at;  // else both have a place, as the end of one is in the midst of the other
    return *this;
  }

 private:
  char* block_ = nullptr;
  int64_t size_ = 0, at_ = 0, taken_ = 0;
};

// A call's working memory: the caller's, or a block of the library's.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes), block_(taken(bytes)), own_(true) {}
  Workspace(void* data, int64_t bytes) : bytes_(bytes), block_{data, 0}, own_(false) {}
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    if (own_) {
      give_block(block_);
    } else {
      allow(block_.data, bytes_);
    }
  }
  // Piece i of `bytes` each.
  Memory piece(int64_t i, int64_t bytes) const {
    if ((i + 1) * bytes > bytes_) throw std::logic_error("condense: more threads than the workspace was counted for.");
    return {static_cast<char*>(block_.data) + i * bytes, bytes};
  }

 private:
  static Block taken(int64_t bytes) {
    try {
      return take_block(bytes);
    } catch (const std::bad_alloc&) {
      fail_to_allocate(bytes, "of working memory");
    }
  }
  int64_t bytes_;
  Block block_;
  bool own_;
};

}  // namespace condense
