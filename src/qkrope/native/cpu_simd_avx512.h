// cpu_simd_avx512.h: sixteen lanes by AVX-512 F, BW, VL and DQ; bfloat16 instructions where built
// in.
#ifndef QKROPE_CPU_SIMD_AVX512_H
#define QKROPE_CPU_SIMD_AVX512_H

// gcc 12 takes the undefined vectors of its own header for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "cpu_simd_part.h"
#include "cpu_simd_quad.h"
#include "params.h"

namespace qk {
namespace {

struct Float16 {
  __m512 v;
  Float16() = default;
  Float16(__m512 x) : v(x) {}
  Float16(float x) : v(_mm512_set1_ps(x)) {}
};

struct Int16 {
  __m512i v;
  Int16(__m512i x) : v(x) {}
  Int16(int x) : v(_mm512_set1_epi32(x)) {}
};

inline Float16 mul(Float16 a, Float16 b) { return a.v * b.v; }
inline Float16 add(Float16 a, Float16 b) { return a.v + b.v; }
inline Float16 div(Float16 a, Float16 b) { return a.v / b.v; }
inline Float16 neg(Float16 a) { return -a.v; }
inline Float16 fma(Float16 a, Float16 b, Float16 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }

inline Int16 wrap_add(Int16 a, Int16 b) { return _mm512_add_epi32(a.v, b.v); }
inline Int16 wrap_mul(Int16 a, Int16 b) { return _mm512_mullo_epi32(a.v, b.v); }
inline Int16 bit_and(Int16 a, Int16 b) { return _mm512_and_si512(a.v, b.v); }
inline Int16 mul_high(Int16 a, Int16 b) {
  __m512i even = _mm512_mul_epi32(a.v, b.v);
  __m512i odd = _mm512_mul_epi32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  return _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}
inline Float16 int_to_float(Int16 a) { return _mm512_cvtepi32_ps(a.v); }
inline Float16 choose_by_bit30(Int16 t, Float16 set, Float16 clear) {
  __mmask16 bit = _mm512_test_epi32_mask(t.v, _mm512_set1_epi32(0x40000000));
  return _mm512_mask_blend_ps(bit, clear.v, set.v);
}
inline Float16 negate_if_negative(Int16 t, Float16 x) {
  return _mm512_xor_ps(x.v, _mm512_and_ps(_mm512_castsi512_ps(t.v), _mm512_set1_ps(-0.0f)));
}

struct Avx512 {
  using F = Float16;
  using I = Int16;
  static constexpr int N = 16;
  static constexpr int kFactors = 16;  // vectors of a table that registers have room for

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
  static I load_bits(const float* p) { return _mm512_loadu_si512(p); }
  static F canonical(F a) {
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return _mm512_mask_blend_ps(nan, a.v, F(__builtin_nanf("")).v);
  }
  static F gather(const float* p, const int* index) {
    return _mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4);
  }
  static F swap(F a) { return _mm512_permute_ps(a.v, 0xb1); }  // (a, b) -> (b, a)

  using D = __m512d;
  static void widen(F a, D& lo, D& hi) {
    lo = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
    hi = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
  }

  static double total(D a) { return _mm512_reduce_add_pd(a); }

  // Rounded to kType, nearest even, and back. A NaN has a zero lower half here and stays.
  template <int kType>
  static F round(F a) {
    if (kType == QK_F32) return a;
    if (kType == QK_F16) return _mm512_cvtph_ps(_mm512_cvtps_ph(a.v, 0));
    __m512i w = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(w, 16), _mm512_set1_epi32(1));
    w = _mm512_add_epi32(w, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(0xffff0000)));
  }

  static float wide_rstd(double x) { return qk::wide_rstd(x); }
  static int rstd(const F* sums, float dim, float eps, float low, float* out) {
    quad four[4];
    for (int i = 0; i < 4; i++) {
      __m512 s = sums[i].v;
      __m256 t = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
      four[i] = (quad)_mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
    }
    return quad_rstd(quad_totals(four[0], four[1], four[2], four[3]), dim, eps, low, out);
  }

  template <int kType>
  static F widen(const char* p) {
    if (kType == QK_F32) return _mm512_loadu_ps(p);
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if (kType == QK_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }

  // Channel order -> (e, o): bfloat16 has the even and the odd channels, in order; for interleaved
  // pairs of other types too, in the order of one shuffle; otherwise the lower and the upper ones.
  template <int kType, bool kInterleaved>
  static void arrange(F lo, F hi, F& e, F& o) {
    e = lo, o = hi;
    if (kType == QK_BF16) {
      const __m512i even =
          _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      e = _mm512_permutex2var_ps(lo.v, even, hi.v);
      o = _mm512_permutex2var_ps(lo.v, _mm512_add_epi32(even, _mm512_set1_epi32(1)), hi.v);
    } else if (kInterleaved) {
      e = _mm512_shuffle_ps(lo.v, hi.v, 0x88);
      o = _mm512_shuffle_ps(lo.v, hi.v, 0xdd);
    }
  }

  template <int kType, bool kInterleaved, bool kPart>
  static void load2(const char* p, int n, F& e, F& o) {
    if (kType == QK_F32) {
      F lo = kPart ? _mm512_maskz_loadu_ps(first(n), p) : _mm512_loadu_ps(p);
      F hi = kPart ? _mm512_maskz_loadu_ps(first(n) >> 16, p + 64) : _mm512_loadu_ps(p + 64);
      return arrange<kType, kInterleaved>(lo, hi, e, o);
    }
    __m512i words = load_words<kPart>(p, n);
    if (kType == QK_F16) {
      F lo = _mm512_cvtph_ps(_mm512_castsi512_si256(words));
      F hi = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1));
      return arrange<kType, kInterleaved>(lo, hi, e, o);
    }
    e = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    o = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000)));
  }

  template <int kType, bool kInterleaved, bool kPart>
  static void store2(char* p, int n, F e, F o) {
    F lo = e, hi = o;
    if (kType != QK_BF16 && kInterleaved)
      lo = _mm512_unpacklo_ps(e.v, o.v), hi = _mm512_unpackhi_ps(e.v, o.v);
    if (kType == QK_F32) {
      put<kPart>(p, _mm512_castps_si512(lo.v), 4 * n);
      return put<kPart>(p + 64, _mm512_castps_si512(hi.v), 4 * n - 64);
    }
    __m512i words;
    if (kType == QK_F16) {
      words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(lo.v, 0)),
                                 _mm512_cvtps_ph(hi.v, 0), 1);
    } else {
      words = to_bf16(e, o, kPart ? first(n) : ~0u);
    }
    put<kPart>(p, words, 2 * n);
  }

#ifdef __AVX512BF16__
  template <int kType>
  static constexpr bool kOneSum = kType == QK_BF16;  // square() leaves its second sum alone
#else
  template <int>
  static constexpr bool kOneSum = false;
#endif

  template <int kType, bool kPart>
  static void square(const char* p, int n, F& a, F& b) {
#ifdef __AVX512BF16__
    if (kType == QK_BF16) {
      // Exact products; those below 2^-126 are lost, see Kernel::Side::low.
      __m512bh words = (__m512bh)load_words<kPart>(p, n);
      a = _mm512_dpbf16_ps(a.v, words, words);
      return;
    }
#endif
    F e, o;
    load2<kType, false, kPart>(p, n, e, o);
    a = fma(e, e, a);
    b = fma(o, o, b);
  }

 private:
  static __mmask32 first(int n) { return (1u << n) - 1; }  // 0 < n < 32

  template <bool kPart>
  static __m512i load_words(const char* p, int n) {
    return kPart ? _mm512_maskz_loadu_epi16(first(n), p) : _mm512_loadu_si512(p);
  }

  template <bool kPart>
  static void put(char* p, __m512i v, int bytes) {
    if (!kPart || bytes >= 64) return _mm512_storeu_si512(p, v);
    store_part(p, _mm512_castsi512_si256(v), bytes);
    store_part(p + 32, _mm512_extracti64x4_epi64(v, 1), bytes - 32);
  }

  // Nearest even, (e, o) to words in the order of channels; `used` says which of them matter.
  static __m512i to_bf16(F e, F o, [[maybe_unused]] __mmask32 used) {
#ifdef __AVX512BF16__
    // The instruction takes what is below 2^-126 for zero, and bfloat16 has values there. So a zero
    // is doubted: it may be one, but then the slower way gives it too.
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i words = (__m512i)_mm512_cvtne2ps_pbh(o.v, e.v);
    words = _mm512_permutexvar_epi16(order, words);
    __mmask32 zero = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(0x7fff));
    if (__builtin_expect(!(zero & used), 1)) return words;
#endif
    // The upper halves, and one more where the lower half, plus one if the upper one is odd, is
    // over a half. A NaN here has a zero lower half and stays.
    const __m512i half = _mm512_set1_epi16((short)0x8000), one = _mm512_set1_epi16(1);
    const __m512i odd = _mm512_set1_epi32(0xffff0000);
    __m512i ew = _mm512_castps_si512(e.v), ow = _mm512_castps_si512(o.v);
    __m512i upper = _mm512_ternarylogic_epi32(odd, ow, _mm512_srli_epi32(ew, 16), 0xca);
    __m512i lower = _mm512_ternarylogic_epi32(odd, _mm512_slli_epi32(ow, 16), ew, 0xca);
    lower = _mm512_adds_epu16(lower, _mm512_and_si512(upper, one));
    return _mm512_add_epi16(upper, _mm512_min_epu16(_mm512_subs_epu16(lower, half), one));
  }
};

}  // namespace
}  // namespace qk
#endif
