// math.h: angle, normalisation, rotation and rounding, defined once for the CPU kernels (F is a
// SIMD vector or float) and for the CUDA kernel (F is float). No includes. Every product and sum is
// explicit, so that neither compiler contracts them its own way.
//
// A SIMD type used as F, with an I for its integers, brings overloads of fma, mul, add, neg and of
// the integer functions below, in its own namespace, where argument-dependent lookup finds them.
#ifndef QKROPE_MATH_H
#define QKROPE_MATH_H

#ifdef __CUDACC__
#define QK_FN static __device__ __forceinline__
#else
#define QK_FN static inline __attribute__((always_inline))
#endif

namespace qk {

#ifdef __CUDACC__
QK_FN float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
QK_FN float mul(float a, float b) { return __fmul_rn(a, b); }
[[maybe_unused]] QK_FN float div(float a, float b) { return __fdiv_rn(a, b); }
QK_FN float add(float a, float b) { return __fadd_rn(a, b); }
QK_FN float neg(float a) { return -a; }
QK_FN double dfma(double a, double b, double c) { return __fma_rn(a, b, c); }
QK_FN double dmul(double a, double b) { return __dmul_rn(a, b); }
QK_FN double dadd(double a, double b) { return __dadd_rn(a, b); }
QK_FN double nearest(double x) { return rint(x); }
QK_FN float int_to_float(int x) { return __int2float_rn(x); }
QK_FN int mul_high(int a, int b) { return __mulhi(a, b); }
#else
QK_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
QK_FN float mul(float a, float b) { return a * b; }
QK_FN float add(float a, float b) { return a + b; }
QK_FN float div(float a, float b) { return a / b; }
QK_FN float neg(float a) { return -a; }
QK_FN double dfma(double a, double b, double c) { return __builtin_fma(a, b, c); }
QK_FN double dmul(double a, double b) { return a * b; }
QK_FN double dadd(double a, double b) { return a + b; }
QK_FN double nearest(double x) { return __builtin_rint(x); }
QK_FN float int_to_float(int x) { return (float)x; }
QK_FN int mul_high(int a, int b) { return (int)(((long long)a * b) >> 32); }
#endif
QK_FN int wrap_add(int a, int b) { return (int)((unsigned)a + (unsigned)b); }
QK_FN int wrap_mul(int a, int b) { return (int)((unsigned)a * (unsigned)b); }
QK_FN int bit_and(int a, int b) { return a & b; }
QK_FN float choose_by_bit30(int t, float set, float clear) { return t & 0x40000000 ? set : clear; }
QK_FN float negate_if_negative(int t, float x) { return t < 0 ? neg(x) : x; }

// ---- angle ------------------------------------------------------------------------------------

// The angle of a position, in units of 2^-32 turn: the top word of position * frac mod 2^64. Exact.
template <class I>
QK_FN I phase(I position, I lo, I hi) {
  return wrap_add(mul_high(position, lo), wrap_mul(position, hi));
}

// A caller's frequency (radians a position) as a 64-bit fraction of a turn. The product with 1/2pi
// is a double-double, reduced to half a turn before the fixed point is cut: within 2^-64 turn while
// |inv_freq| < 2^40. A frequency must be finite.
QK_FN void frac_of_inv_freq(double inv_freq, int& lo, int& hi) {
  const double inv_2pi = 0.15915494309189535, inv_2pi_low = -9.839338337591243e-18;
  const double two32 = 4294967296.0;
  double t = dmul(inv_freq, inv_2pi);
  double e = dfma(inv_freq, inv_2pi_low, dfma(inv_freq, inv_2pi, -t));
  t = dadd(t, -nearest(t));  // whole turns do not matter
  e = dadd(e, -nearest(e));
  double sum = dadd(t, e), moved = dadd(sum, -t);
  double rest = dadd(dadd(t, -dadd(sum, -moved)), dadd(e, -moved));
  sum = dadd(sum, -nearest(sum));
  double word = nearest(dmul(sum, two32));
  double low = nearest(dmul(dadd(dfma(sum, two32, -word), dmul(rest, two32)), two32));
  if (low >= 2147483648.0) low -= two32, word += 1.0;
  if (low < -2147483648.0) low += two32, word -= 1.0;
  lo = (int)low;
  hi = (int)(unsigned)(long long)word;
}

// Sine and cosine of phase * 2^-32 turn by polynomials in turns, |x| <= 1/8 after the nearest
// quarter turn is taken off. Maximum error over all 2^32 phases 1.01e-7, sine and cosine.
template <class F>
QK_FN F sin_poly(F x, F z, F c0, F c1, F c2, F c3) {
  return mul(x, fma(z, fma(z, fma(z, c3, c2), c1), c0));
}
template <class F>
QK_FN F cos_poly(F z, F one, F c1, F c2, F c3, F c4) {
  return fma(z, fma(z, fma(z, fma(z, c4, c3), c2), c1), one);
}
#define QK_SIN_COEFFICIENTS \
  6.2831854820251465f, -41.3416633605957f, 81.59235382080078f, -75.39356231689453f
#define QK_COS_COEFFICIENTS \
  1.0f, -19.739208221435547f, 64.93932342529297f, -85.44374084472656f, 59.24596405029297f
#define QK_TURN 2.3283064365386963e-10f  // 2^-32

template <class I, class F>
QK_FN void sincos_phase(I phase, F& s, F& c) {
  I t = wrap_add(phase, I(0x20000000));  // bits 31, 30: the nearest quarter; below: the distance
  F x = mul(int_to_float(wrap_add(bit_and(t, I(0x3fffffff)), I(-0x20000000))), F(QK_TURN));
  F z = mul(x, x);
  F sp = sin_poly<F>(x, z, QK_SIN_COEFFICIENTS);
  F cp = cos_poly<F>(z, QK_COS_COEFFICIENTS);
  s = negate_if_negative(t, choose_by_bit30(t, cp, sp));
  c = negate_if_negative(wrap_add(t, I(0x40000000)), choose_by_bit30(t, sp, cp));
}

// ---- normalise and rotate ---------------------------------------------------------------------

// Weight of a channel: weight_offset is 1 for the zero-centred weights of Gemma, else 0.
template <class F>
QK_FN F effective_weight(F weight, F offset) {
  return add(weight, offset);
}

// The same with every operation rounded to T by R::round, as a chain of separate ones has it; each
// is explicit, so that the bits hold on every machine. `by` is rstd, or the length to divide by.
template <class R, class F>
QK_FN F normalise_by_steps(F x, F mean, F by, bool divides, F weight) {
  x = add(x, neg(mean));
  return R::round(mul(R::round(divides ? div(x, by) : mul(x, by)), weight));
}

// One channel of a pair, x * c + partner * s, with or without rounded products; s has its sign.
template <class R, class F>
QK_FN F turn_by_steps(F x, F partner, F c, F s, bool round_products) {
  x = mul(x, c), partner = mul(partner, s);
  if (round_products) x = R::round(x), partner = R::round(partner);
  return R::round(add(x, partner));
}

// The pair (a, b) turned by the angle of (c, s). Channels of a pair have an angle each only where a
// caller's full-width table says so; then ca, sa and cb, sb differ.
template <class F>
QK_FN void rotate(F a, F b, F ca, F sa, F cb, F sb, F& ya, F& yb) {
  ya = fma(a, ca, neg(mul(b, sa)));
  yb = fma(b, cb, mul(a, sb));
}

// ---- gradients ----------------------------------------------------------------------------------

// The transpose of rotate: from the gradients of (ya, yb) to those of (a, b).
template <class F>
[[maybe_unused]] QK_FN void rotate_back(F dya, F dyb, F ca, F sa, F cb, F sb, F& da, F& db) {
  da = fma(dya, ca, mul(dyb, sb));
  db = fma(dyb, cb, neg(mul(dya, sa)));
}

// From the gradient g of (x - mean) * rstd * weight to that of x, with n = (x - mean) * rstd and
// gx = g * weight. `along` is the average of gx * n (an l2 norm: the sum), `mean` that of gx
// (LayerNorm; else 0), over the channels that share the statistic.
template <class F>
[[maybe_unused]] QK_FN F normalise_back(F gx, F n, F along, F mean, F rstd) {
  return mul(add(fma(neg(n), along, gx), neg(mean)), rstd);
}

}  // namespace qk
#endif
