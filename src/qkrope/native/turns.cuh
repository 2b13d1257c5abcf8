// turns.cuh: from a token's position or table row to the factors of its rotation.
#include "rows.cuh"

namespace {

// ---- angles -----------------------------------------------------------------------------------

__device__ __forceinline__ void sincos_of_phase(int phase, float& s, float& c) {
  if (QK_DTYPE == QK_F32) {
    qk::sincos_phase(phase, s, c);
  } else {
#if __CUDA_ARCH__ >= 860
    sincos_by_hardware(__fmul_rn((float)phase, 1.46291807926715968e-9f), s, c);
#else
    // Here a conversion takes the pipe of the sines: the nearest fraction of a turn of 23 bits goes
    // into a mantissa instead. Half a turn is left over, which the signs make up for.
    const float turn = __int_as_float(0x3f800000 | (int)(((unsigned)phase + 0x100u) >> 9));
    sincos_by_hardware(__fmul_rn(__fadd_rn(turn, -1.5f), 6.283185307179586f), s, c);
    s = -s, c = -c;
#endif
  }
}

// The table is ours and aligned, so two entries make a 16-byte load.
template <int kMany>
__device__ __forceinline__ void read_frac(const qk_frac* table, int first,
                                          qk_frac (&frac)[kCount]) {
#pragma unroll
  for (int i = 0; i < kMany; i += 2) {
    if (first + i + 1 < kRotatedPairs) {
      const int4 two = *(const int4*)(table + first + i);
      frac[i].lo = two.x, frac[i].hi = two.y, frac[i + 1].lo = two.z, frac[i + 1].hi = two.w;
    } else if (first + i < kRotatedPairs) {
      frac[i] = table[first + i];
    }
  }
}

// A caller's frequencies, read after the wait. Returns a bit for each pair whose frequency is not
// finite; its channels become NaN.
__device__ __forceinline__ unsigned read_inv_freq(const qk_launch& p, int first,
                                                  qk_frac (&frac)[kCount]) {
  unsigned bad = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (first + i >= kRotatedPairs) continue;
    const long long at = (first + i) * p.inv_freq_step;
    const double f = p.inv_freq_dtype == QK_F64 ? ((const double*)p.inv_freq)[at]
                                                : (double)((const float*)p.inv_freq)[at];
    if (!(f - f == 0.0)) bad |= 1u << i;
    qk::frac_of_inv_freq(f, frac[i].lo, frac[i].hi);
  }
  return bad;
}

// Byte offsets of a token, from its index in the coalesced leading dimensions.
struct Token {
  long long x, y, pos, cos, sin;
};

[[maybe_unused]] __device__ __forceinline__ Token locate(const qk_launch& p, int side,
                                                         unsigned token) {
  Token t = {0, 0, 0, 0, 0};
  if (p.ndim == 1 && QK_ANGLE != QK_ANGLE_TABLE) {
    t.x = token * p.side[side].x_token, t.y = token * p.side[side].y_token;
    t.pos = token * p.pos_token;
    return t;
  }
#pragma unroll 1
  for (int d = p.ndim - 1; d >= 0; --d) {
    unsigned i = d ? token % p.size[d] : token;
    if (d) token /= p.size[d];
    t.x += i * p.x_dim[side][d], t.y += i * p.y_dim[side][d];
    t.pos += i * p.pos_dim[d];
    if (QK_ANGLE == QK_ANGLE_TABLE) t.cos += i * p.cos_dim[d], t.sin += i * p.sin_dim[d];
  }
  return t;
}

// What the rotation multiplies a lane's normalised channels by, weights inside:
// y_a = n_a * aa - n_b * ab, y_b = n_b * bb + n_a * ba, with n = x * rstd.
struct Factors {
  float aa[kCount], ab[kCount] = {}, bb[kCount], ba[kCount] = {};
};

template <typename Weight>
__device__ __forceinline__ void weigh(const Weight& weight, float offset, Factors& f) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) f.aa[i] = weight.a(i), f.bb[i] = weight.b(i);
  if (offset != 0.0f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      f.aa[i] = qk::effective_weight(f.aa[i], offset);
      f.bb[i] = qk::effective_weight(f.bb[i], offset);
    }
  }
}

__device__ __forceinline__ void turn(int i, float ca, float sa, float cb, float sb, Factors& f) {
  const float a = f.aa[i], b = f.bb[i];
  f.aa[i] = qk::mul(a, ca), f.ab[i] = qk::mul(b, sa);
  f.bb[i] = qk::mul(b, cb), f.ba[i] = qk::mul(a, sb);
}

__device__ __forceinline__ void turn_by_table(const qk_launch& p, const Token& at, int position,
                                              bool bad, int first, Factors& f) {
  long long cos_at = at.cos, sin_at = at.sin;
  if (p.table_rows) {
    bad |= position < 0 || position >= p.table_rows;
    cos_at = bad ? 0 : position * p.cos_row, sin_at = bad ? 0 : position * p.sin_row;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int j = first + i;
    if (j >= kRotatedPairs) continue;
    const int a = p.table_full ? channel_a(j) : j, b = p.table_full ? channel_b(j) : j;
    float ca = table_value(p.cos, p.table_dtype, cos_at + a * p.cos_step);
    float sa = table_value(p.sin, p.table_dtype, sin_at + a * p.sin_step);
    float cb = ca, sb = sa;
    if (p.table_full) {
      cb = table_value(p.cos, p.table_dtype, cos_at + b * p.cos_step);
      sb = table_value(p.sin, p.table_dtype, sin_at + b * p.sin_step);
    }
    if (bad) ca = sa = cb = sb = QK_NAN;
    turn(i, ca, sa, cb, sb, f);
  }
}

__device__ __forceinline__ void turn_by_phase(int position, float factor, int first,
                                              const qk_frac (&frac)[kCount], unsigned bad_pairs,
                                              Factors& f) {
  if (kWholeLanes && first >= kRotatedPairs) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (!kWholeLanes && first + i >= kRotatedPairs) continue;
    float s, c;
    sincos_of_phase(qk::phase(position, frac[i].lo, frac[i].hi), s, c);
    if (bad_pairs >> i & 1) s = c = QK_NAN;
    if (!kScaled && factor != 1.0f) s = qk::mul(s, factor), c = qk::mul(c, factor);
    turn(i, c, s, c, s, f);
  }
}

}  // namespace
