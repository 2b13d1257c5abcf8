// cpu_simd_quad.h: four floats by the compiler's vector types, and the end of four heads'
// statistics.
#ifndef QKROPE_CPU_SIMD_QUAD_H
#define QKROPE_CPU_SIMD_QUAD_H

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace qk {
namespace {

typedef float quad __attribute__((vector_size(16)));
typedef int quad_int __attribute__((vector_size(16)));

inline quad quad_sqrt(quad x) {
#ifdef __SSE2__
  return (quad)_mm_sqrt_ps((__m128)x);
#else
  return quad{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]),
              __builtin_sqrtf(x[3])};
#endif
}

inline float wide_rstd(double mean_and_eps) {
#ifdef __SSE2__
  __m128d x = _mm_set_sd(mean_and_eps);
  return (float)(1.0 / _mm_cvtsd_f64(_mm_sqrt_sd(x, x)));
#else
  return (float)(1.0 / __builtin_sqrt(mean_and_eps));
#endif
}

// 1 / sqrt(sum / dim + eps) of four heads. Returns a bit for each sum that is below `low`, infinite
// or NaN.
inline int quad_rstd(quad sum, float dim, float eps, float low, float* rstd) {
  quad result = 1.0f / quad_sqrt(sum / dim + eps);
  __builtin_memcpy(rstd, &result, sizeof result);
  quad_int good = (sum >= low) & (sum <= __FLT_MAX__);
#ifdef __SSE2__
  return _mm_movemask_ps((__m128)good) ^ 15;
#else
  return (good[0] ? 0 : 1) | (good[1] ? 0 : 2) | (good[2] ? 0 : 4) | (good[3] ? 0 : 8);
#endif
}

// The four totals of [i][j], j = 0..3, in one order for every i.
inline quad quad_totals(quad a, quad b, quad c, quad d) {
#ifdef __SSE2__
  __m128 ab =
      _mm_add_ps(_mm_unpacklo_ps((__m128)a, (__m128)b), _mm_unpackhi_ps((__m128)a, (__m128)b));
  __m128 cd =
      _mm_add_ps(_mm_unpacklo_ps((__m128)c, (__m128)d), _mm_unpackhi_ps((__m128)c, (__m128)d));
  return (quad)_mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
#else
  quad evens = {a[0] + a[2], b[0] + b[2], c[0] + c[2], d[0] + d[2]};
  quad odds = {a[1] + a[3], b[1] + b[3], c[1] + c[3], d[1] + d[3]};
  return evens + odds;
#endif
}

}  // namespace
}  // namespace qk
#endif
