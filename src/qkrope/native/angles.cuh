// angles.cuh: the rotation of the general kernel: from a token's positions on each axis, or its
// rows of a table, or those of one of its heads, to a lane's pairs turned.
#include "options.cuh"

namespace {

// The positions of a token on each axis.
struct Place {
  int on_axis[kAxes ? kAxes : 1];
  bool bad;
};

__device__ __forceinline__ Place read_place(const qk_launch_general& p, const char* pos) {
  Place place = {{}, false};
  if (QK_ANGLE == QK_ANGLE_TABLE && !p.plain.pos) return place;
#pragma unroll
  for (int a = 0; a < (kAxes ? kAxes : 1); ++a) {
    const int* at = (const int*)(pos + a * p.pos_axis);
    const int position = place.on_axis[a] = at[0];
    if (p.plain.pos_wide) place.bad |= at[1] != position >> 31;
    if (QK_ANGLE == QK_ANGLE_TABLE) place.bad |= position < 0 || position >= p.plain.table_rows;
  }
  return place;
}

// Cosine and sine of both channels of a lane's pairs; they differ only in a caller's full table.
struct Angles {
  static constexpr bool kFull = QK_ANGLE == QK_ANGLE_TABLE;
  float cos_a[kCount], sin_a[kCount], cos_of_b[kFull ? kCount : 1], sin_of_b[kFull ? kCount : 1];

  __device__ __forceinline__ float cos_b(int i) const {
    return kFull ? cos_of_b[kFull ? i : 0] : cos_a[i];
  }
  __device__ __forceinline__ float sin_b(int i) const {
    return kFull ? sin_of_b[kFull ? i : 0] : sin_a[i];
  }
  template <int kSide>
  __device__ __forceinline__ void round() {
    if constexpr (Of<kSide>::kRoundedAngle) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        cos_a[i] = Round::round(cos_a[i]), sin_a[i] = Round::round(sin_a[i]);
        if constexpr (kFull)
          cos_of_b[i] = Round::round(cos_of_b[i]), sin_of_b[i] = Round::round(sin_of_b[i]);
      }
    }
  }
};

__device__ __forceinline__ int position_of(const Place& place, int r) {
  int position = place.on_axis[0];
  if (kAxes) {
    const int axis = axis_of(r);
#pragma unroll
    for (int a = 1; a < kAxes; ++a) position = axis == a ? place.on_axis[a] : position;
  }
  return position;
}

// The lane's frequencies: the Spec's, or a caller's, with a bit for each that is not finite.
__device__ __forceinline__ unsigned read_frac(const qk_launch& p, int first,
                                              qk_frac (&frac)[kCount]) {
  unsigned bad = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int r = first + i - kFirstTurning;
    frac[i].lo = frac[i].hi = 0;
    if (!rotated(first + i)) continue;
    if (QK_ANGLE == QK_ANGLE_PHASE) {
      const int2 words = ((const int2*)p.frac)[r];
      frac[i].lo = words.x, frac[i].hi = words.y;
    } else {
      const long long at = r * p.inv_freq_step;
      const double f = p.inv_freq_dtype == QK_F64 ? ((const double*)p.inv_freq)[at]
                                                  : (double)((const float*)p.inv_freq)[at];
      if (!(f - f == 0.0)) bad |= 1u << i;
      qk::frac_of_inv_freq(QK_REVERSE ? -f : f, frac[i].lo, frac[i].hi);
    }
  }
  return bad;
}

template <int kSide>
__device__ __forceinline__ void angles_of_phase(const Place& place, float factor, int first,
                                                const qk_frac (&frac)[kCount], unsigned bad,
                                                Angles& to) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int position = position_of(place, first + i - kFirstTurning);
    const int phase = qk::phase(position, frac[i].lo, frac[i].hi);
    float s, c;
    if (QK_DTYPE == QK_F32 || Of<kSide>::kRounds)  // the hardware would decide too many ties
      qk::sincos_phase(phase, s, c);
    else
      sincos_by_hardware(qk::mul((float)phase, 1.46291807926715968e-9f), s, c);
    const float by = place.bad || bad >> i & 1 ? QK_NAN : factor;
    to.cos_a[i] = qk::mul(c, by), to.sin_a[i] = qk::mul(s, by);
  }
  to.round<kSide>();
}

// cos, sin: where the token's rows begin, or those of one head of it.
template <int kSide>
__device__ __forceinline__ void angles_of_table(const qk_launch& p, const Place& place,
                                                long long cos, long long sin, int first,
                                                Angles& to) {
  auto value = [&](const char* table, long long at) {
    return place.bad ? QK_NAN : table_value(table, p.table_dtype, at);
  };
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int j = first + i, r = j - kFirstTurning;
    to.cos_a[i] = 1.0f, to.sin_a[i] = 0.0f;
    to.cos_of_b[Angles::kFull ? i : 0] = 1.0f, to.sin_of_b[Angles::kFull ? i : 0] = 0.0f;
    if (!rotated(j)) continue;
    const long long row = p.table_rows ? position_of(place, r) : 0;
    const long long cos_at = cos + row * p.cos_row, sin_at = sin + row * p.sin_row;
    const int a = p.table_full ? entry_a(j) : r, b = p.table_full ? entry_b(j) : r;
    float ca = value(p.cos, cos_at + a * p.cos_step), cb = ca;
    float sa = value(p.sin, sin_at + a * p.sin_step), sb = sa;
    if (p.table_full) {
      cb = value(p.cos, cos_at + b * p.cos_step);
      sb = value(p.sin, sin_at + b * p.sin_step);
    }
    to.cos_a[i] = ca, to.cos_of_b[Angles::kFull ? i : 0] = cb;
    to.sin_a[i] = QK_REVERSE ? -sa : sa, to.sin_of_b[Angles::kFull ? i : 0] = QK_REVERSE ? -sb : sb;
  }
  to.round<kSide>();
}

template <int kSide>
__device__ __forceinline__ void turn(const Angles& by, int first, Values& v) {
  constexpr bool kSteps = Of<kSide>::kRounds;
  constexpr bool kRoundProducts = Of<kSide>::kSpec.round_turn == QK_TURN_B;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float a = v.a[i], b = v.b[i];
    float ya, yb;
    if (kSteps) {
      ya = qk::turn_by_steps<Round>(a, b, by.cos_a[i], -by.sin_a[i], kRoundProducts);
      yb = qk::turn_by_steps<Round>(b, a, by.cos_b(i), by.sin_b(i), kRoundProducts);
    } else {
      qk::rotate(a, b, by.cos_a[i], by.sin_a[i], by.cos_b(i), by.sin_b(i), ya, yb);
    }
    if (turns(first, i)) v.a[i] = ya, v.b[i] = yb;
  }
}

}  // namespace
