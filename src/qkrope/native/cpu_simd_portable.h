// cpu_simd_portable.h: four lanes in the compiler's own vector types, for every little-endian
// machine.
#ifndef QKROPE_CPU_SIMD_PORTABLE_H
#define QKROPE_CPU_SIMD_PORTABLE_H

#include "cpu_simd_quad.h"
#include "params.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "pairs of 16-bit values are split by order");

namespace qk {
namespace {

typedef unsigned quad_bits __attribute__((vector_size(16)));

struct Float4 {
  quad v;
  Float4() = default;
  Float4(quad x) : v(x) {}
  Float4(float x) : v(quad{x, x, x, x}) {}
};

struct Int4 {
  quad_bits v;
  Int4(quad_bits x) : v(x) {}
  Int4(int x) : v(quad_bits{(unsigned)x, (unsigned)x, (unsigned)x, (unsigned)x}) {}
};

inline Float4 mul(Float4 a, Float4 b) { return a.v * b.v; }
inline Float4 add(Float4 a, Float4 b) { return a.v + b.v; }
inline Float4 div(Float4 a, Float4 b) { return a.v / b.v; }
inline Float4 neg(Float4 a) { return -a.v; }
// Two roundings where the machine has no fused form: a call to the C library for each would cost
// more than all the rest, and the error bound has the room.
inline Float4 fma(Float4 a, Float4 b, Float4 c) {
#ifdef __FP_FAST_FMAF
  return quad{__builtin_fmaf(a.v[0], b.v[0], c.v[0]), __builtin_fmaf(a.v[1], b.v[1], c.v[1]),
              __builtin_fmaf(a.v[2], b.v[2], c.v[2]), __builtin_fmaf(a.v[3], b.v[3], c.v[3])};
#else
  return a.v * b.v + c.v;
#endif
}

inline Int4 wrap_add(Int4 a, Int4 b) { return a.v + b.v; }
inline Int4 wrap_mul(Int4 a, Int4 b) { return a.v * b.v; }
inline Int4 bit_and(Int4 a, Int4 b) { return a.v & b.v; }
inline Int4 mul_high(Int4 a, Int4 b) {
  quad_bits r;
  for (int i = 0; i < 4; i++) r[i] = (unsigned)(((long long)(int)a.v[i] * (int)b.v[i]) >> 32);
  return r;
}
inline Float4 int_to_float(Int4 a) { return __builtin_convertvector((quad_int)a.v, quad); }
inline quad select(quad_int mask, quad set, quad clear) {
  return (quad)((mask & (quad_int)set) | (~mask & (quad_int)clear));
}
inline Float4 choose_by_bit30(Int4 t, Float4 set, Float4 clear) {
  return select((quad_int)(t.v << 1) >> 31, set.v, clear.v);
}
inline Float4 negate_if_negative(Int4 t, Float4 x) {
  return (quad)((t.v & 0x80000000u) ^ (quad_bits)x.v);
}

struct Portable {
  using F = Float4;
  using I = Int4;
  static constexpr int N = 4;
  static constexpr int kFactors = 0;  // vectors of a table that registers have room for
  template <int>
  static constexpr bool kOneSum = false;  // square() leaves its second sum alone

  static F load(const float* p) { return raw<quad>(p); }
  static void store(float* p, F a) { __builtin_memcpy(p, &a.v, 16); }
  static I load_bits(const float* p) { return raw<quad_bits>(p); }
  static F canonical(F a) { return select(a.v == a.v, a.v, F(__builtin_nanf("")).v); }
  static F gather(const float* p, const int* i) { return quad{p[i[0]], p[i[1]], p[i[2]], p[i[3]]}; }
  static F swap(F a) { return quad{a.v[1], a.v[0], a.v[3], a.v[2]}; }  // (a, b) -> (b, a)

  typedef double D __attribute__((vector_size(16)));
  static void widen(F a, D& lo, D& hi) { lo = D{a.v[0], a.v[1]}, hi = D{a.v[2], a.v[3]}; }

  static double total(D a) { return a[0] + a[1]; }

  // Rounded to kType, nearest even, and back. A NaN has a zero lower half here and stays.
  template <int kType>
  static F round(F a) {
    if (kType == QK_F32) return a;
    if (kType == QK_F16) return from_half(to_half(a));
    return (quad)(to_bf16(a) & 0xffff0000u);
  }

  static float wide_rstd(double x) { return qk::wide_rstd(x); }
  static int rstd(const F* sums, float dim, float eps, float low, float* out) {
    quad total = quad_totals(sums[0].v, sums[1].v, sums[2].v, sums[3].v);
    return quad_rstd(total, dim, eps, low, out);
  }

  template <int kType>
  static F widen(const char* p) {
    if (kType == QK_F32) return raw<quad>(p);
    unsigned short h[4];
    __builtin_memcpy(h, p, 8);
    quad_bits words = {h[0], h[1], h[2], h[3]};
    return kType == QK_BF16 ? (quad)(words << 16) : from_half(words);
  }

  // Channel order -> (e, o): for 16-bit types and for interleaved pairs the even and the odd ones.
  template <int kType, bool kInterleaved>
  static void arrange(F lo, F hi, F& e, F& o) {
    e = lo, o = hi;
    if (kType == QK_F32 && !kInterleaved) return;
    e = quad{lo.v[0], lo.v[2], hi.v[0], hi.v[2]};
    o = quad{lo.v[1], lo.v[3], hi.v[1], hi.v[3]};
  }

  template <int kType, bool kInterleaved, bool kPart>
  static void load2(const char* p, int n, F& e, F& o) {
    char part[32] = {};
    if (kPart) __builtin_memcpy(part, p, n * (kType == QK_F32 ? 4 : 2)), p = part;
    if (kType == QK_F32) return arrange<kType, kInterleaved>(raw<quad>(p), raw<quad>(p + 16), e, o);
    quad_bits words = raw<quad_bits>(p);
    e = kType == QK_BF16 ? (quad)(words << 16) : from_half(words & 0xffff);
    o = kType == QK_BF16 ? (quad)(words & 0xffff0000u) : from_half(words >> 16);
  }

  template <int kType, bool kInterleaved, bool kPart>
  static void store2(char* p, int n, F e, F o) {
    char part[32];
    char* to = kPart ? part : p;
    if (kType == QK_F32) {
      if (kInterleaved) {
        quad a = e.v, b = o.v;
        e = quad{a[0], b[0], a[1], b[1]}, o = quad{a[2], b[2], a[3], b[3]};
      }
      __builtin_memcpy(to, &e.v, 16);
      __builtin_memcpy(to + 16, &o.v, 16);
    } else {
      quad_bits words = kType == QK_BF16 ? (to_bf16(e) >> 16) | (to_bf16(o) & 0xffff0000u)
                                         : to_half(e) | (to_half(o) << 16);
      __builtin_memcpy(to, &words, 16);
    }
    if (kPart) __builtin_memcpy(p, part, n * (kType == QK_F32 ? 4 : 2));
  }

  template <int kType, bool kPart>
  static void square(const char* p, int n, F& a, F& b) {
    F e, o;
    load2<kType, false, kPart>(p, n, e, o);
    a = fma(e, e, a);
    b = fma(o, o, b);
  }

 private:
  template <class T>
  static T raw(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
  }

  // Nearest even in the upper half of each word. A NaN here has a zero lower half and stays.
  static quad_bits to_bf16(F a) {
    quad_bits w = (quad_bits)a.v;
    return w + 0x7fffu + ((w >> 16) & 1u);
  }

  static F from_half(quad_bits h) {
    quad_bits rest = (h & 0x7fffu) << 13;
    quad_bits special = (quad_bits)((quad_int)rest >= 0x0f800000);  // infinities and NaN
    quad_bits size = (quad_bits)((quad)rest * 0x1p112f);
    size = (special & (rest | 0x7f800000u)) | (~special & size);
    return (quad)(size | ((h & 0x8000u) << 16));
  }

  static quad_bits to_half(F a) {
    quad_bits w = (quad_bits)a.v, sign = (w >> 16) & 0x8000u;
    quad_int size = (quad_int)(w & 0x7fffffffu);
    quad_bits normal =
        ((quad_bits)size + 0xfffu + (((quad_bits)size >> 13) & 1u) - 0x38000000u) >> 13;
    // Below the least normal half, adding 1/2 leaves the count of the least subnormals.
    quad_bits small = (quad_bits)((quad)size + 0.5f) - 0x3f000000u;
    quad_bits result = choose(size < 0x38800000, small, normal);
    result = choose(size >= 0x477ff000, quad_bits{} + 0x7c00u, result);
    return choose(size > 0x7f800000, quad_bits{} + 0x7e00u, result) | sign;
  }
  static quad_bits choose(quad_int mask, quad_bits set, quad_bits clear) {
    return ((quad_bits)mask & set) | (~(quad_bits)mask & clear);
  }
};

}  // namespace
}  // namespace qk
#endif
