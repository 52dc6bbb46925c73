// Runs every loop of csrc/rowops.h beside one written plainly. Compiled with csrc/rowops.cpp, without torch's
// libraries, for whatever processor (tests/test_rowops.py). The argument is the number of the instruction set that may
// be used; prints the one in use and what is wrong, and returns 1 if anything is.
#include <cstdlib>

#include "environment.h"
#include "loops.h"
#include "subnormals.h"
#include "tiles.h"

static int allowed = 0;
condense::InstructionSet condense::allowed_instruction_set() { return static_cast<InstructionSet>(allowed); }

// The thread keeps them while the guard lives, whatever was set before it, which is as it was after it.
static void subnormals() {
  plain::in_test = "subnormals";
  volatile float tiny = 1e-38f, half = 0.5f;
  const auto kept = [&] { return int64_t{tiny * half > 0}; };
#if defined(__x86_64__)
  const auto flush = [](bool on) { _mm_setcsr(on ? _mm_getcsr() | 0x8040u : _mm_getcsr() & ~0x8040u); };
#elif defined(__aarch64__)
  const auto flush = [](bool on) {
    const uint64_t control = on ? uint64_t{1} << 24 : 0;
    asm volatile("msr fpcr, %0" ::"r"(control) : "memory");
  };
#else
  const auto flush = [](bool) {};
#endif
  for (const bool on : {true, false}) {
    flush(on);
    const int64_t before = kept();
    {
      const condense::KeepSubnormals keep;
      plain::expect_same(kept(), int64_t{1});
    }
    plain::expect_same(kept(), before);
    if (!on) plain::expect_same(before, int64_t{1});
  }
}

int main(int argc, char** argv) {
  allowed = argc > 1 ? std::atoi(argv[1]) : 0;
  std::printf("%s\n", condense::row_ops<float>().instruction_set);
  subnormals();
  plain::test_tiles<float>();
  plain::test_tiles<double>();
  plain::test_loops<float>();
  plain::test_loops<double>();
  if (plain::failures) std::printf("%d failures\n", plain::failures);
  return plain::failures > 0;
}
