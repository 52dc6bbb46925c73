#include "rowops.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "environment.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define CONDENSE_ISA isa_default
#define CONDENSE_ISA_NAME "default"
#define CONDENSE_ISA_BYTES 16
#define CONDENSE_ISA_PAIRS 0
#include "rowops_isa.h"
#undef CONDENSE_ISA
#undef CONDENSE_ISA_NAME
#undef CONDENSE_ISA_BYTES

// Clang spells the pragma differently; there the portable loops serve alone.
#if defined(__x86_64__) && !defined(__clang__)
#define CONDENSE_HAS_X86_ISAS 1
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wuninitialized"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define CONDENSE_ISA isa_avx2
#define CONDENSE_ISA_NAME "avx2"
#define CONDENSE_ISA_BYTES 32
#include "rowops_isa.h"
#undef CONDENSE_ISA
#undef CONDENSE_ISA_NAME
#undef CONDENSE_ISA_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define CONDENSE_ISA isa_avx512
#define CONDENSE_ISA_NAME "avx512"
#define CONDENSE_ISA_BYTES 64
#include "rowops_isa.h"
#undef CONDENSE_ISA
#undef CONDENSE_ISA_NAME
#undef CONDENSE_ISA_PAIRS
#pragma GCC pop_options

#if __GNUC__ >= 11
#define CONDENSE_HAS_BF16_ISAS 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#define CONDENSE_ISA isa_avx512_bf16
#define CONDENSE_ISA_NAME "avx512_bf16"
#define CONDENSE_ISA_PAIRS 1
#include "rowops_isa.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
#include "rowops_amx.h"
#pragma GCC pop_options
#endif
#endif

namespace condense {
namespace {

#if defined(CONDENSE_HAS_X86_ISAS)
InstructionSet best_of_processor() {
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(CONDENSE_HAS_BF16_ISAS)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return InstructionSet::kAvx512Bf16;
#endif
  if (avx512) return InstructionSet::kAvx512;
  // Every processor with AVX2 and FMA has F16C, which older compilers cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return avx2 ? InstructionSet::kAvx2 : InstructionSet::kDefault;
}

// The kernel lends out the tile registers' state on request, once for the whole process.
bool can_use_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // of leaf 7, edx
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTiles)) != (kBf16 | kTiles)) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

InstructionSet choose(InstructionSet allowed) {
  const InstructionSet best = best_of_processor();
  if (allowed != InstructionSet::kAmx) return std::min(best, allowed);
  return best == InstructionSet::kAvx512Bf16 && can_use_amx() ? InstructionSet::kAmx : best;
}

#if defined(CONDENSE_HAS_BF16_ISAS)
template <class T>
RowOps<T> with_amx() {
  RowOps<T> ops = isa_avx512_bf16::row_ops<T>();
  ops.instruction_set = "amx";
  if constexpr (sizeof(T) == 4) {
    ops.pack_pairs = [](const T* rows, int64_t first, int64_t depth, T* panel) {
      std::memcpy(panel + first * kChunk, rows, kStep * kChunk * sizeof(T));
      isa_avx512_bf16::row_ops<T>().pack_pairs(rows, first, depth, panel + kChunk * kTile);
    };
    ops.pairs_panel = isa_amx::kPanel;
    ops.multiply_pairs = isa_amx::multiply_pairs;
    ops.spin_pairs = nullptr;
  }
  return ops;
}
#endif
#endif

}  // namespace

template <class T>
const RowOps<T>& row_ops() {
  [[maybe_unused]] static const InstructionSet allowed = allowed_instruction_set();
#if defined(CONDENSE_HAS_X86_ISAS)
  static const InstructionSet chosen = choose(allowed);
#if defined(CONDENSE_HAS_BF16_ISAS)
  static const RowOps<T> amx = with_amx<T>();
  if (chosen == InstructionSet::kAmx) return amx;
  if (chosen == InstructionSet::kAvx512Bf16) return isa_avx512_bf16::row_ops<T>();
#endif
  if (chosen == InstructionSet::kAvx512) return isa_avx512::row_ops<T>();
  if (chosen == InstructionSet::kAvx2) return isa_avx2::row_ops<T>();
#endif
  return isa_default::row_ops<T>();
}

template const RowOps<float>& row_ops<float>();
template const RowOps<double>& row_ops<double>();

}  // namespace condense
