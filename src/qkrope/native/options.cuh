// options.cuh: what a variant does to a head beyond the plain norm and rotation: each kind of norm
// and rounding, weights, biases and scales, angles by axis, by table and by head. What the Spec
// says of q, k and v is compiled in, what a call brings is asked for as it runs.
#include "channels.cuh"

namespace {

enum { kQ, kK, kV };

struct SideSpec {
  int norm, row, dim, rest, weight_dim, round_norm, round_turn;
};
constexpr SideSpec kSides[3] = {QK_SIDES};

__device__ constexpr bool fits(const SideSpec& s) {
  return s.dim >= 2 && s.dim <= kHeadDim && (!s.row || s.dim == kHeadDim) &&
         (s.dim < kHeadDim || s.rest == QK_NORM_NONE) &&
         s.weight_dim == (s.rest == QK_NORM_NONE ? s.dim : kHeadDim) &&
         (s.round_norm == QK_ROUND_ONCE) == (s.round_turn == QK_TURN_ONCE);
}
static_assert(fits(kSides[kQ]) && fits(kSides[kK]) && fits(kSides[kV]), "norm");

// Sides of one kind share their code: the number of the first.
__device__ constexpr bool alike(int i, int j) {
  const SideSpec &s = kSides[i], &t = kSides[j];
  return s.norm == t.norm && s.row == t.row && s.dim == t.dim && s.rest == t.rest &&
         s.weight_dim == t.weight_dim && s.round_norm == t.round_norm &&
         s.round_turn == t.round_turn && (!kRotates || (i == kV) == (j == kV));
}
__device__ constexpr int kind_of(int side) {
  return side > kQ && alike(kQ, side) ? kQ : side > kK && alike(kK, side) ? kK : side;
}

// A norm of a row of heads needs all warps of its token (kTeams), which then stay in one block.
constexpr bool kTeams = (kSides[kQ].row && kSides[kQ].norm != QK_NORM_NONE) ||
                        (kSides[kK].row && kSides[kK].norm != QK_NORM_NONE) ||
                        (kSides[kV].row && kSides[kV].norm != QK_NORM_NONE);

template <int kSide>
struct Of {
  static constexpr SideSpec kSpec = kSides[kSide];
  static constexpr int kNorm = kSpec.norm, kRest = kSpec.rest;
  static constexpr bool kTurns = kRotates && kSide != kV, kMove = kTurns && kMoves;
  static constexpr bool kRow = kSpec.row && kNorm != QK_NORM_NONE;
  static constexpr bool kWhole = kSpec.dim == kHeadDim;
  static constexpr bool kRounds = kSpec.round_norm != QK_ROUND_ONCE;
  static constexpr bool kSteps = kRounds && kSpec.round_norm != QK_ROUND_B;
  static constexpr bool kRoundedAngle =
      kSpec.round_turn == QK_TURN_B || kSpec.round_turn == QK_TURN_H;
};

// The channels of pair j where the norm sees them.
template <int kSide>
__device__ constexpr int norm_a(int j) {
  return QK_ROPE_FIRST ? out_a<Of<kSide>::kMove>(j) : in_a(j);
}
template <int kSide>
__device__ constexpr int norm_b(int j) {
  return QK_ROPE_FIRST ? out_b<Of<kSide>::kMove>(j) : in_b(j);
}

struct Round {
  __device__ __forceinline__ static float round(float x) {
    if (QK_DTYPE == QK_F32) return x;
    return widen_half_word<QK_DTYPE>(narrow_pair<QK_DTYPE>(x, x), false);
  }
};

// A lane's share of a head: the channels a and b of its pairs.
struct Values {
  float a[kCount], b[kCount];
};

[[maybe_unused]] __device__ __forceinline__ void round_all(Values& v) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) v.a[i] = Round::round(v.a[i]), v.b[i] = Round::round(v.b[i]);
}

[[maybe_unused]] __device__ __forceinline__ bool is_there(int first, int i) {
  return kFullLanes || first + i < kPairs;
}

// ---- weights and biases -----------------------------------------------------------------------

template <int kMany>
__device__ __forceinline__ void read_run(const char* row, int type, int channel, float* to) {
  if (type == QK_F32) {
    unsigned words[kMany];
    load_run<kMany, 16>(row + channel * 4, words);
#pragma unroll
    for (int i = 0; i < kMany; ++i) to[i] = __uint_as_float(words[i]);
    return;
  }
  unsigned words[kMany / 2];
  load_run<kMany / 2, 16>(row + channel * 2, words);
  if (type == QK_BF16) {
#pragma unroll
    for (int i = 0; i < kMany; ++i) to[i] = element<QK_BF16>(words, i);
  } else {
#pragma unroll
    for (int i = 0; i < kMany; ++i) to[i] = element<QK_F16>(words, i);
  }
}

// The channels below weight_dim of a weight or bias; the others are `absent`.
template <int kSide, int kBytes>
__device__ __forceinline__ void read_channels(const char* row, int type, int first, float absent,
                                              Values& to) {
  constexpr int kDim = Of<kSide>::kSpec.weight_dim, kRun = kTwoRuns ? kCount : 2 * kCount;
#pragma unroll
  for (int i = 0; i < kCount; ++i) to.a[i] = to.b[i] = absent;
  if constexpr (kBytes > 0 && kDim % kRun == 0 && !(QK_ROPE_FIRST && Of<kSide>::kMove)) {
    if constexpr (kTwoRuns) {
      if (kDim == kHeadDim || in_a(first) < kDim) read_run<kCount>(row, type, in_a(first), to.a);
      if (kDim == kHeadDim || in_b(first) < kDim) read_run<kCount>(row, type, in_b(first), to.b);
    } else if (kDim == kHeadDim || in_a(first) < kDim) {
      float both[2 * kCount];
      read_run<2 * kCount>(row, type, in_a(first), both);
#pragma unroll
      for (int i = 0; i < kCount; ++i) to.a[i] = both[2 * i], to.b[i] = both[2 * i + 1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!is_there(first, i)) continue;
      const int a = norm_a<kSide>(first + i), b = norm_b<kSide>(first + i);
      if (kDim == kHeadDim || a < kDim) to.a[i] = table_value(row, type, a);
      if (kDim == kHeadDim || b < kDim) to.b[i] = table_value(row, type, b);
    }
  }
}

[[maybe_unused]] __device__ __forceinline__ const char* row_of(const void* base, int type,
                                                               long long elements) {
  return (const char*)base + elements * (type == QK_F32 ? 4 : 2);
}

template <int kSide, int kBytes>
__device__ __forceinline__ void read_weight(const qk_launch_side& side, const qk_launch_extra& more,
                                            const void* row, int first, Values& w) {
  using Is = Of<kSide>;
  if (!side.weight) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) w.a[i] = w.b[i] = 1.0f;
    return;
  }
  read_channels<kSide, kBytes>((const char*)row, more.weight_dtype, first, 1.0f, w);
  const float offset = side.weight_offset, other = more.rest_offset;
  if (!Is::kSteps && offset == 0.0f && other == 0.0f) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool a = Is::kWhole || norm_a<kSide>(first + i) < Is::kSpec.dim;
    const bool b = Is::kWhole || norm_b<kSide>(first + i) < Is::kSpec.dim;
    w.a[i] = qk::effective_weight(w.a[i], a ? offset : other);
    w.b[i] = qk::effective_weight(w.b[i], b ? offset : other);
  }
  if (Is::kSteps) round_all(w);
}

// ---- statistics -------------------------------------------------------------------------------

// A bit for each of the lane's channels that a statistic is of: below `dim`, or (kRest) from it on.
struct Span {
  unsigned a, b;
};
template <int kSide, bool kRest>
__device__ __forceinline__ Span span_of(int first) {
  using Is = Of<kSide>;
  if (Is::kWhole && kFullLanes) return {~0u, ~0u};
  Span span = {0, 0};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (!is_there(first, i)) continue;
    const bool a = norm_a<kSide>(first + i) < Is::kSpec.dim,
               b = norm_b<kSide>(first + i) < Is::kSpec.dim;
    span.a |= (unsigned)(a != kRest) << i, span.b |= (unsigned)(b != kRest) << i;
  }
  return span;
}

// A sum with what its additions lost. A mean needs it: beside its error, as large as that of the
// largest channel, a small channel's deviation would be nothing. Squares lose nothing that counts.
struct Sum {
  float high, low;
};
[[maybe_unused]] __device__ __forceinline__ float join(float a, float b) { return qk::add(a, b); }
[[maybe_unused]] __device__ __forceinline__ Sum join(const Sum& a,
                                                     const Sum& b) {  // the same for (b, a)
  const float high = qk::add(a.high, b.high), b_part = qk::add(high, -a.high);
  const float lost = qk::add(qk::add(a.high, -qk::add(high, -b_part)), qk::add(b.high, -b_part));
  return {high, qk::add(qk::add(a.low, b.low), lost)};
}
[[maybe_unused]] __device__ __forceinline__ float shuffled(float x, int from) {
  return __shfl_sync(kAllLanes, x, from);
}
[[maybe_unused]] __device__ __forceinline__ Sum shuffled(const Sum& x, int from) {
  return {shuffled(x.high, from), shuffled(x.low, from)};
}
template <int kRows>
__device__ __forceinline__ void group_sums(Sum (&sums)[kRows], int base, int rank) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int from = (rank ^ step) & ~(step - 1);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Sum other = shuffled(sums[i], base + from);
      if (from < kLanes) sums[i] = join(sums[i], other);
    }
  }
}

template <int kNorm>
__device__ __forceinline__ float minus_mean(float x, float mean) {
  return kNorm == QK_NORM_LAYER ? qk::add(x, -mean) : x;
}
[[maybe_unused]] __device__ __forceinline__ void add_to(float& squares, float x) {
  squares = qk::fma(x, x, squares);
}
[[maybe_unused]] __device__ __forceinline__ void add_to(Sum& sum, float x) {
  sum = join(sum, {x, 0.0f});
}

// The lane's part of the sum of x (a Sum), or of the squares of x - mean. Units are summed on their
// own and then pairwise, as group_sums goes on across lanes.
template <int kNorm, typename Part>
__device__ __forceinline__ Part lane_sum(const Values& v, const Span& span, float mean) {
  Part unit[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    Part sum_a = {}, sum_b = {};
#pragma unroll
    for (int i = 4 * u; i < 4 * u + 4; ++i) {
      add_to(sum_a, span.a >> i & 1 ? minus_mean<kNorm>(v.a[i], mean) : 0.0f);
      add_to(sum_b, span.b >> i & 1 ? minus_mean<kNorm>(v.b[i], mean) : 0.0f);
    }
    unit[u] = join(sum_a, sum_b);
  }
#pragma unroll
  for (int step = 1; step < kUnits; step *= 2)
#pragma unroll
    for (int u = 0; u + step < kUnits; u += 2 * step) unit[u] = join(unit[u], unit[u + step]);
  return unit[0];
}

// What a deviation from the mean is multiplied with, or (an l2 norm in steps) divided by.
template <int kNorm, int kRounding>
__device__ __forceinline__ float scale_by(float squares, float mean_square, float eps) {
  float by;
  if (kNorm == QK_NORM_L2) {
    const float length = __fsqrt_rn(squares);
    by = length < eps ? eps : length;  // a NaN stays
    if (kRounding != QK_ROUND_C) by = __frcp_rn(by);
  } else {
    mean_square = qk::add(mean_square, eps);
    by = kRounding == QK_ROUND_ONCE ? rsqrtf(mean_square) : __frsqrt_rn(mean_square);
  }
  return kRounding == QK_ROUND_C ? Round::round(by) : by;
}

struct Statistic {
  float mean, by;
};

template <int kNorm, int kRounding>
__device__ __forceinline__ float normalise(float x, const Statistic& s, float weight, float bias,
                                           bool has_bias) {
  if (kNorm == QK_NORM_NONE) return x;
  constexpr bool kDivides = kNorm == QK_NORM_L2 && kRounding == QK_ROUND_C;
  if (kRounding == QK_ROUND_A || kRounding == QK_ROUND_C)
    x = qk::normalise_by_steps<Round>(x, s.mean, s.by, kDivides, weight);
  else
    x = qk::mul(qk::mul(minus_mean<kNorm>(x, s.mean), s.by), weight);
  if (has_bias) x = qk::add(x, bias);
  return kRounding == QK_ROUND_ONCE ? x : Round::round(x);
}

// ((x - mean) * by * weight + bias), each channel by the statistic of its span.
template <int kSide>
__device__ __forceinline__ void normalise_all(Values& v, const Span& span, const Statistic& whole,
                                              const Statistic& rest, const Values& weight,
                                              const Values& bias, bool has_bias) {
  using Is = Of<kSide>;
  constexpr int kRounding = Is::kSpec.round_norm;
  auto one = [&](float x, bool in_whole, float w, float b) {
    const float y = normalise<Is::kNorm, kRounding>(x, whole, w, b, has_bias);
    if (Is::kWhole) return y;
    return in_whole ? y : normalise<Is::kRest, kRounding>(x, rest, w, b, has_bias);
  };
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    v.a[i] = one(v.a[i], span.a >> i & 1, weight.a[i], has_bias ? bias.a[i] : 0.0f);
    v.b[i] = one(v.b[i], span.b >> i & 1, weight.b[i], has_bias ? bias.b[i] : 0.0f);
  }
}

// What a call multiplies the normalised head with: a number, or a tensor's element for each
// channel.
template <int kSide>
__device__ __forceinline__ void scale_all(const qk_launch_extra& more, long long token, int head,
                                          int first, Values& v) {
  const long long at = token + head * more.scale_head;
  auto scale = [&](int channel) {
    if (!more.scale_of) return more.scale;
    return table_value(more.scale_of, more.scale_dtype, at + channel * more.scale_channel);
  };
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (!is_there(first, i)) continue;
    v.a[i] = qk::mul(v.a[i], scale(norm_a<kSide>(first + i)));
    v.b[i] = qk::mul(v.b[i], scale(norm_b<kSide>(first + i)));
    if (Of<kSide>::kRounds) v.a[i] = Round::round(v.a[i]), v.b[i] = Round::round(v.b[i]);
  }
}

}  // namespace
