// slopes.cuh: the sums that the gradient of a norm takes, over the channels of a head or of a row
// of heads. The variant's macros come before it (see backward_general.cu).
#include "options.cuh"

namespace {

template <typename Term>
__device__ __forceinline__ float lane_total(const Span& span, Term&& term) {
  float unit[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    float sum_a = 0.0f, sum_b = 0.0f;
#pragma unroll
    for (int i = 4 * u; i < 4 * u + 4; ++i) {
      if (span.a >> i & 1) sum_a = term(i, false, sum_a);
      if (span.b >> i & 1) sum_b = term(i, true, sum_b);
    }
    unit[u] = qk::add(sum_a, sum_b);
  }
#pragma unroll
  for (int step = 1; step < kUnits; step *= 2)
#pragma unroll
    for (int u = 0; u + step < kUnits; u += 2 * step) unit[u] = qk::add(unit[u], unit[u + step]);
  return unit[0];
}

// A sum of x, and that of the gradient of the normalised x; then of squares, and along x.
struct First {
  Sum x;
  float g;
};
struct Second {
  float squares, along;
};
[[maybe_unused]] __device__ __forceinline__ First join(const First& a, const First& b) {
  return {join(a.x, b.x), qk::add(a.g, b.g)};
}
[[maybe_unused]] __device__ __forceinline__ First shuffled(const First& x, int from) {
  return {shuffled(x.x, from), shuffled(x.g, from)};
}
[[maybe_unused]] __device__ __forceinline__ Second join(const Second& a, const Second& b) {
  return {qk::add(a.squares, b.squares), qk::add(a.along, b.along)};
}
[[maybe_unused]] __device__ __forceinline__ Second shuffled(const Second& x, int from) {
  return {shuffled(x.squares, from), shuffled(x.along, from)};
}

// The lane's part of either; gx: the gradient times the weight.
[[maybe_unused]] __device__ __forceinline__ First first_sums(const Values& x, const Values& gx,
                                                             const Span& span) {
  return {lane_sum<QK_NORM_NONE, Sum>(x, span, 0.0f), lane_total(span, [&](int i, bool b, float s) {
            return qk::add(s, b ? gx.b[i] : gx.a[i]);
          })};
}
template <int kNorm>
__device__ __forceinline__ Second second_sums(const Values& x, const Values& gx, const Span& span,
                                              float mean) {
  return {lane_sum<kNorm, float>(x, span, mean), lane_total(span, [&](int i, bool b, float s) {
            const float n = minus_mean<kNorm>(b ? x.b[i] : x.a[i], mean);
            return qk::fma(b ? gx.b[i] : gx.a[i], n, s);
          })};
}

// Over the lanes of a group, or over those of a team's warps (all threads of a block call that).
template <typename Part>
__device__ __forceinline__ Part group_sum(Part x, int base, int rank) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int from = (rank ^ step) & ~(step - 1);
    const Part other = shuffled(x, base + from);
    if (from < kLanes) x = join(x, other);
  }
  return x;
}
template <typename Part>
__device__ __forceinline__ Part team_sum(Part x, int begin, int warps) {
  __shared__ Part sums[QK_TEAM_WARPS(kHeadDim)];
#pragma unroll
  for (int step = 16; step; step /= 2) x = join(x, shuffled(x, (threadIdx.x ^ step) % 32));
  __syncthreads();  // who reads those of the last token is done
  if (threadIdx.x == 0) sums[threadIdx.y] = x;
  __syncthreads();
  x = {};
  if ((int)threadIdx.x < warps) x = sums[begin + threadIdx.x];
#pragma unroll
  for (int step = QK_TEAM_WARPS(kHeadDim) / 2; step; step /= 2)
    x = join(x, shuffled(x, (threadIdx.x ^ step) % 32));
  return shuffled(x, 0);
}

// What the gradient of a norm takes: n = (x - mean) * by, and the averages of gx * n and of gx.
struct Slope {
  float mean, by, along, level;
};

template <int kNorm>
__device__ __forceinline__ void set_mean(const First& sums, float share, Slope& to) {
  if (kNorm != QK_NORM_LAYER) return;
  to.mean = qk::mul(qk::add(sums.x.high, sums.x.low), share);
  to.level = qk::mul(sums.g, share);
}
template <int kNorm>
__device__ __forceinline__ void set_slope(const Second& sums, float share, float eps, Slope& to) {
  to.by = scale_by<kNorm, QK_ROUND_ONCE>(sums.squares, qk::mul(sums.squares, share), eps);
  to.along = qk::mul(sums.along, to.by);
  if (kNorm != QK_NORM_L2) to.along = qk::mul(to.along, share);
  // A row shorter than eps is divided by eps, whatever it is.
  if (kNorm == QK_NORM_L2 && __fsqrt_rn(sums.squares) < eps) to.along = 0.0f;
}

}  // namespace
