/* kernel.c again, for processors with AVX2. */

#if defined(__x86_64__) && defined(__GNUC__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,bmi,bmi2")
#endif
#define CROP  crop_avx2
#define WIDTH 8
#include "kernel.c"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
