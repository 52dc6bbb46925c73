// What `make sanitize` has to tell the sanitizers (docs/checking.md). In other builds there is nothing of it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__has_feature)  // Clang's way to say what GCC says by itself
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer) && !defined(__SANITIZE_THREAD__)
#define __SANITIZE_THREAD__ 1
#endif
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>

#include <cstring>
#endif

namespace condense {

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kRedZone = 64;  // between the pieces of a block, where an index beyond one meets nothing else

// AddressSanitizer knows what malloc gives, and not what becomes of it here.
inline void forbid(const void* data, size_t bytes) { __asan_poison_memory_region(data, bytes); }
inline void allow(const void* data, size_t bytes) { __asan_unpoison_memory_region(data, bytes); }
// As NaN, or -1: who reads what nobody has written computes something else.
inline void hand_out(void* data, size_t bytes) {
  allow(data, bytes);
  std::memset(data, 0xFF, bytes);
}
#else
constexpr int64_t kRedZone = 0;

inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
inline void hand_out(void*, size_t) {}
#endif

}  // namespace condense
