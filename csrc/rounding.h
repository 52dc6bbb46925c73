// Every source file is compiled with this one first (setup.py): a compiler that computes other values than the source
// says, of itself or by flags that setup.py does not undo, is refused.
#pragma once

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "this compiler replaces floating-point operations by others (-ffast-math); condense_kernels needs those it names"
#endif
#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0
#error "float is computed in a wider type (-mfpmath=387); condense_kernels needs each operation rounded"
#endif
static_assert(sizeof(0.1) == 8, "double constants are of type float (-fsingle-precision-constant)");
