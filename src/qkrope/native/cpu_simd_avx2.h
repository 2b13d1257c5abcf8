// cpu_simd_avx2.h: eight lanes by AVX2, FMA and F16C.
#ifndef QKROPE_CPU_SIMD_AVX2_H
#define QKROPE_CPU_SIMD_AVX2_H

#include <immintrin.h>

#include "cpu_simd_part.h"
#include "cpu_simd_quad.h"
#include "params.h"

namespace qk {
namespace {

struct Float8 {
  __m256 v;
  Float8() = default;
  Float8(__m256 x) : v(x) {}
  Float8(float x) : v(_mm256_set1_ps(x)) {}
};

struct Int8 {
  __m256i v;
  Int8(__m256i x) : v(x) {}
  Int8(int x) : v(_mm256_set1_epi32(x)) {}
};

inline Float8 mul(Float8 a, Float8 b) { return a.v * b.v; }
inline Float8 add(Float8 a, Float8 b) { return a.v + b.v; }
inline Float8 div(Float8 a, Float8 b) { return a.v / b.v; }
inline Float8 neg(Float8 a) { return -a.v; }
inline Float8 fma(Float8 a, Float8 b, Float8 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }

inline Int8 wrap_add(Int8 a, Int8 b) { return _mm256_add_epi32(a.v, b.v); }
inline Int8 wrap_mul(Int8 a, Int8 b) { return _mm256_mullo_epi32(a.v, b.v); }
inline Int8 bit_and(Int8 a, Int8 b) { return _mm256_and_si256(a.v, b.v); }
inline Int8 mul_high(Int8 a, Int8 b) {
  __m256i even = _mm256_mul_epi32(a.v, b.v);
  __m256i odd = _mm256_mul_epi32(_mm256_srli_epi64(a.v, 32), _mm256_srli_epi64(b.v, 32));
  return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
inline Float8 int_to_float(Int8 a) { return _mm256_cvtepi32_ps(a.v); }
inline Float8 choose_by_bit30(Int8 t, Float8 set, Float8 clear) {
  return _mm256_blendv_ps(clear.v, set.v, _mm256_castsi256_ps(_mm256_slli_epi32(t.v, 1)));
}
inline Float8 negate_if_negative(Int8 t, Float8 x) {
  return _mm256_xor_ps(x.v, _mm256_and_ps(_mm256_castsi256_ps(t.v), _mm256_set1_ps(-0.0f)));
}

struct Avx2 {
  using F = Float8;
  using I = Int8;
  static constexpr int N = 8;
  static constexpr int kFactors = 0;  // vectors of a table that registers have room for
  template <int>
  static constexpr bool kOneSum = false;  // square() leaves its second sum alone

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
  static I load_bits(const float* p) { return load_all(p); }
  static F canonical(F a) {
    return _mm256_blendv_ps(a.v, F(__builtin_nanf("")).v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  }
  static F gather(const float* p, const int* index) {
    return _mm256_i32gather_ps(p, load_all(index), 4);
  }
  static F swap(F a) { return _mm256_permute_ps(a.v, 0xb1); }  // (a, b) -> (b, a)

  using D = __m256d;
  static void widen(F a, D& lo, D& hi) {
    lo = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v));
    hi = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1));
  }

  static double total(D a) {
    __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(s) + _mm_cvtsd_f64(_mm_unpackhi_pd(s, s));
  }

  // Rounded to kType, nearest even, and back. A NaN has a zero lower half here and stays.
  template <int kType>
  static F round(F a) {
    if (kType == QK_F32) return a;
    if (kType == QK_F16) return _mm256_cvtph_ps(_mm256_cvtps_ph(a.v, 0));
    __m256i w = _mm256_castps_si256(a.v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(w, 16), _mm256_set1_epi32(1));
    w = _mm256_add_epi32(w, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(0xffff0000)));
  }

  static float wide_rstd(double x) { return qk::wide_rstd(x); }
  static int rstd(const F* sums, float dim, float eps, float low, float* out) {
    quad four[4];
    for (int i = 0; i < 4; i++)
      four[i] =
          (quad)_mm_add_ps(_mm256_castps256_ps128(sums[i].v), _mm256_extractf128_ps(sums[i].v, 1));
    return quad_rstd(quad_totals(four[0], four[1], four[2], four[3]), dim, eps, low, out);
  }

  template <int kType>
  static F widen(const char* p) {
    if (kType == QK_F32) return _mm256_castsi256_ps(load_all(p));
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if (kType == QK_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  // Channel order -> (e, o): bfloat16 has the even and the odd channels, in order; for interleaved
  // pairs of other types too, in the order of one shuffle; otherwise the lower and the upper ones.
  template <int kType, bool kInterleaved>
  static void arrange(F lo, F hi, F& e, F& o) {
    e = lo, o = hi;
    if (kType == QK_BF16 || kInterleaved) {
      e = _mm256_shuffle_ps(lo.v, hi.v, 0x88);
      o = _mm256_shuffle_ps(lo.v, hi.v, 0xdd);
    }
    if (kType == QK_BF16) {
      e = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(e.v), 0xd8));
      o = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(o.v), 0xd8));
    }
  }

  template <int kType, bool kInterleaved, bool kPart>
  static void load2(const char* p, int n, F& e, F& o) {
    if (kType == QK_F32) {
      __m256i lo = kPart ? load_part(p, 4 * n) : load_all(p);
      __m256i hi = kPart ? load_part(p + 32, 4 * n - 32) : load_all(p + 32);
      return arrange<kType, kInterleaved>(_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi), e, o);
    }
    __m256i words = kPart ? load_part(p, 2 * n) : load_all(p);
    if (kType == QK_F16) {
      F lo = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
      F hi = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
      return arrange<kType, kInterleaved>(lo, hi, e, o);
    }
    e = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    o = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xffff0000)));
  }

  template <int kType, bool kInterleaved, bool kPart>
  static void store2(char* p, int n, F e, F o) {
    F lo = e, hi = o;
    if (kType != QK_BF16 && kInterleaved)
      lo = _mm256_unpacklo_ps(e.v, o.v), hi = _mm256_unpackhi_ps(e.v, o.v);
    __m256i words = _mm256_castps_si256(lo.v);
    if (kType == QK_F32) {
      put<kPart>(p + 32, _mm256_castps_si256(hi.v), 4 * n - 32);
      return put<kPart>(p, words, 4 * n);
    }
    if (kType == QK_F16) {
      words = _mm256_set_m128i(_mm256_cvtps_ph(hi.v, 0), _mm256_cvtps_ph(lo.v, 0));
    } else {
      words = to_bf16(_mm256_castps_si256(e.v), _mm256_castps_si256(o.v));
    }
    put<kPart>(p, words, 2 * n);
  }

  template <int kType, bool kPart>
  static void square(const char* p, int n, F& a, F& b) {
    F e, o;
    load2<kType, false, kPart>(p, n, e, o);
    a = fma(e, e, a);
    b = fma(o, o, b);
  }

 private:
  // Nearest even, in words in the order of channels: the upper halves, and one more where the lower
  // half, plus one if the upper one is odd, is over a half. A NaN here has a zero lower half and
  // stays.
  static __m256i to_bf16(__m256i e, __m256i o) {
    const __m256i half = _mm256_set1_epi16((short)0x8000), one = _mm256_set1_epi16(1);
    __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(e, 16), o, 0xaa);
    __m256i lower = _mm256_blend_epi16(e, _mm256_slli_epi32(o, 16), 0xaa);
    lower = _mm256_adds_epu16(lower, _mm256_and_si256(upper, one));
    return _mm256_add_epi16(upper, _mm256_min_epu16(_mm256_subs_epu16(lower, half), one));
  }

  template <bool kPart>
  static void put(char* p, __m256i v, int bytes) {
    store_part(p, v, kPart ? bytes : 32);
  }
};

}  // namespace
}  // namespace qk
#endif
