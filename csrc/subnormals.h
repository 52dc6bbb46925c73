// Arithmetic of the thread that keeps subnormal numbers.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace condense {

// Subnormal numbers count while this lives: torch.set_flush_denormal acts on single threads, and a result must not
// depend on which of them computed it.
class KeepSubnormals {
 public:
#if defined(__x86_64__)
  KeepSubnormals() : before_(_mm_getcsr()) {
    _mm_setcsr(before_ & ~0x8040u);
  }  // neither flush to zero nor read as zero
  ~KeepSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  KeepSubnormals() : before_(control()) { set_control(before_ & ~kFlush); }
  ~KeepSubnormals() { set_control(before_); }

 private:
  // FZ of results, FZ16 of those in half precision, and FIZ of inputs, a bit that other processors ignore.
  static constexpr uint64_t kFlush = 1u << 24 | 1u << 19 | 1u;
  static uint64_t control() {
    uint64_t fpcr;
    asm volatile("mrs %0, fpcr" : "=r"(fpcr)::"memory");
    return fpcr;
  }
  static void set_control(uint64_t fpcr) { asm volatile("msr fpcr, %0" ::"r"(fpcr) : "memory"); }
  uint64_t before_;
#endif
};

}  // namespace condense
