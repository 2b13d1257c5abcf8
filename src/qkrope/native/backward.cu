// backward.cu: the gradients of what kernel.cu computes. Lanes share a head as there. The grid
// stays for the whole call: a group of lanes goes from one unit (a few heads of one token) to the
// next, reads the next one before it computes this one, and keeps the sum of the weight's gradient
// of its channels in registers. The macros are those of kernel.cu.
#include "sums.cuh"
#include "turns.cuh"

namespace {

using Launch = qk_launch_backward_plain;

// A group of lanes, and the unit that it reads next.
struct Work {
  int is_k, first, rank, base;  // base: lane 0 of the group
  unsigned token;
  int unit;
  bool idle;  // no group of heads
};

template <int kBytes, int kRows>
struct Batch {
  Share<QK_DTYPE, kBytes> x[kRows], dy[kRows];
  char* dx;
  int count;  // heads
  int position, high_word;
  long long cos, sin;
};

// Where the heads of a unit lie, and the offsets of its token as in turns.cuh.
struct Heads {
  long long x, dy, dx, pos, cos, sin;
  int count;
};

template <int kBytes>
__device__ __forceinline__ Heads find(const Launch& p, const Work& work) {
  const qk_launch& plain = p.plain;
  const qk_launch_side& side = plain.side[work.is_k];
  const qk_backward_side& more = p.more[work.is_k];
  const int head = work.unit * side.passes, place = Share<QK_DTYPE, kBytes>::place(work.first);
  const bool none = work.idle || work.token >= plain.tokens;
  Heads heads = {0, 0, 0, 0, 0, 0, none ? 0 : min(side.heads - head, side.passes)};
  unsigned token = min(work.token, plain.tokens - 1);
  if (plain.ndim == 1 && QK_ANGLE != QK_ANGLE_TABLE) {
    heads.x = token * side.x_token, heads.dy = token * more.dy_token;
    heads.dx = token * side.y_token, heads.pos = token * plain.pos_token;
  } else {
#pragma unroll 1
    for (int d = plain.ndim - 1; d >= 0; --d) {
      const unsigned i = d ? token % plain.size[d] : token;
      if (d) token /= plain.size[d];
      heads.x += i * plain.x_dim[work.is_k][d], heads.dx += i * plain.y_dim[work.is_k][d];
      heads.dy += i * p.dy_dim[work.is_k][d], heads.pos += i * plain.pos_dim[d];
      if (QK_ANGLE == QK_ANGLE_TABLE)
        heads.cos += i * plain.cos_dim[d], heads.sin += i * plain.sin_dim[d];
    }
  }
  heads.x += head * side.x_head + place, heads.dy += head * more.dy_head + place;
  heads.dx += head * side.y_head + place;
  return heads;
}

__device__ __forceinline__ void step(const qk_backward_side& side, Work& work) {
  work.token += side.step_tokens, work.unit += side.step_units;
  if (work.unit >= side.units) work.unit -= side.units, ++work.token;
}

// 3. Load a unit, every head of it at once, and go on to the next.
template <int kBytes, int kRows>
__device__ __forceinline__ void load(const Launch& p, Work& work, bool normed,
                                     Batch<kBytes, kRows>& to) {
  const qk_launch_side& side = p.plain.side[work.is_k];
  const qk_backward_side& more = p.more[work.is_k];
  const Heads heads = find<kBytes>(p, work);
  to.count = heads.count;
  to.dx = side.y + heads.dx;
  to.cos = heads.cos, to.sin = heads.sin;
  to.position = to.high_word = 0;
  if (QK_ANGLE != QK_ANGLE_NONE && (QK_ANGLE != QK_ANGLE_TABLE || p.plain.pos)) {
    const int* const pos = (const int*)(p.plain.pos + heads.pos);
    to.position = *pos;
    if (p.plain.pos_wide) to.high_word = pos[1];
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    to.x[i].clear(), to.dy[i].clear();
    if (i >= to.count) continue;
    if (normed) to.x[i].load(side.x + heads.x + i * side.x_head, work.first);
    to.dy[i].load(more.dy + heads.dy + i * more.dy_head, work.first);
  }
  step(more, work);
}

// What a block knows of its side.
struct Side {
  bool normed;
  float eps;
  float weight_a[kCount], weight_b[kCount];
};

template <int kType, int kBytes>
__device__ __forceinline__ void read_weight(const qk_launch_side& side, int first, Side& to) {
  Share<kType, kBytes> share;
  if (side.weight)
    share.load((const char*)side.weight + share.place(first), first);
  else
    share.fill_ones();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    to.weight_a[i] = qk::effective_weight(share.a(i), side.weight_offset);
    to.weight_b[i] = qk::effective_weight(share.b(i), side.weight_offset);
  }
}

// 4. and 5. The unit's angles; then head by head the rotation back, the two sums of its norm, and
// dx. No store begins before every load of the unit is back.
template <int kBytes, int kRows>
__device__ __forceinline__ void finish(const Launch& p, const Work& work, const Side& own,
                                       const qk_frac (&frac)[kCount], unsigned bad_pairs,
                                       Batch<kBytes, kRows>& batch, float (&sums)[2 * kCount]) {
  const int first = work.first;
  Factors f;  // of the rotation alone
#pragma unroll
  for (int i = 0; i < kCount; ++i) f.aa[i] = f.bb[i] = 1.0f;
  const bool bad = p.plain.pos_wide && batch.high_word != batch.position >> 31;
  const float factor = bad ? QK_NAN : p.plain.attention_factor;
  const Token at = {0, 0, 0, batch.cos, batch.sin};
  if (QK_ANGLE == QK_ANGLE_TABLE)
    turn_by_table(p.plain, at, batch.position, bad, first, f);
  else if (QK_ANGLE != QK_ANGLE_NONE)
    turn_by_phase(batch.position, factor, first, frac, bad_pairs, f);

  // Of each head the sums of x^2 and of gx * x; ga, gb: the gradient of the normalised head.
  float both[2 * kRows], ga[kRows][kCount], gb[kRows][kCount];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const auto &x = batch.x[i], &dy = batch.dy[i];
    float unit[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float sum_a = 0.0f, sum_b = 0.0f;
#pragma unroll
      for (int j = 4 * u; j < 4 * u + 4; ++j) {
        const float dya = dy.a(j), dyb = dy.b(j);
        qk::rotate_back(dya, dyb, f.aa[j], f.ab[j], f.bb[j], f.ba[j], ga[i][j], gb[i][j]);
        if (!rotated(first, j)) ga[i][j] = dya, gb[i][j] = dyb;
        sum_a = qk::fma(qk::mul(ga[i][j], own.weight_a[j]), x.a(j), sum_a);
        sum_b = qk::fma(qk::mul(gb[i][j], own.weight_b[j]), x.b(j), sum_b);
      }
      unit[u] = qk::add(sum_a, sum_b);
    }
#pragma unroll
    for (int step = 1; step < kUnits; step *= 2)
#pragma unroll
      for (int u = 0; u + step < kUnits; u += 2 * step) unit[u] = qk::add(unit[u], unit[u + step]);
    both[2 * i] = x.sum_of_squares(), both[2 * i + 1] = unit[0];
  }
  if (kNormed) group_sums(both, work.base, work.rank);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const bool there = i < batch.count;
    float rstd = 1.0f, along = 0.0f;
    if (kNormed && own.normed) {
      rstd = rsqrtf(qk::fma(both[2 * i], 1.0f / kHeadDim, own.eps));
      along = qk::mul(qk::mul(both[2 * i + 1], rstd), 1.0f / kHeadDim);
    }
    auto one = [&](float x, float g, float weight, float& sum) {
      if (!kNormed) return g;
      const float n = qk::mul(x, rstd);
      if (there) sum = qk::fma(g, n, sum);
      return qk::normalise_back(qk::mul(g, weight), n, along, 0.0f, rstd);
    };
    float held_a = 0.0f, held_b = 0.0f;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float a = one(batch.x[i].a(j), ga[i][j], own.weight_a[j], sums[2 * j]);
      const float b = one(batch.x[i].b(j), gb[i][j], own.weight_b[j], sums[2 * j + 1]);
      batch.dy[i].set(j, a, b, held_a, held_b);
    }
    if (there) batch.dy[i].store(batch.dx + i * p.plain.side[work.is_k].y_head, first);
  }
}

// Asks for the lane's sectors of a row, which a wait may precede.
template <int kBytes>
__device__ __forceinline__ void fetch_row(const char* row, const Work& work) {
  using Row = Share<QK_DTYPE, kBytes>;
  constexpr int kRun = Row::kWords * 4 / (kHalf ? 2 : 1), kSharing = kRun < 32 ? 32 / kRun : 1;
  if (work.rank % kSharing) return;
#pragma unroll
  for (int at = 0; at < kRun; at += 32) {
    fetch_into_l2(row + at);
    if (kHalf) fetch_into_l2(row + at + Row::apart(work.first));
  }
}

template <int kBytes>
__device__ __forceinline__ void read_weights(const Launch& p, const Work& work, Side& to) {
  const qk_launch_side& side = p.plain.side[work.is_k];
  if (QK_Q_WEIGHT == QK_K_WEIGHT || !work.is_k)
    read_weight<QK_Q_WEIGHT, kBytes>(side, work.first, to);
  else
    read_weight<QK_K_WEIGHT, kBytes>(side, work.first, to);
}

template <int kBytes, int kRows, bool kAhead>
__device__ __forceinline__ void run(const Launch& p) {
  release_next();

  // 1. Place: which side, which unit first, which pairs of a head.
  Work work;
  const int group = threadIdx.x / kLanes;
  work.rank = threadIdx.x % kLanes, work.first = work.rank * kCount, work.base = group * kLanes;
  work.idle = group >= kGroups;
  work.is_k = (int)blockIdx.x >= p.plain.q_slots;
  const qk_launch_side& side = p.plain.side[work.is_k];
  const qk_backward_side& more = p.more[work.is_k];
  const unsigned block = blockIdx.x - (work.is_k ? p.plain.q_slots : 0);
  const unsigned unit = (block * blockDim.y + threadIdx.y) * kGroups + group;
  work.token = unit / more.units, work.unit = unit % more.units;

  // 2. What no earlier kernel on the stream can have written, before waiting for that kernel. A
  // line may come into L2 before it is written, as it is read after the wait.
  Side own;
  own.normed = (work.is_k ? QK_K_NORM : QK_Q_NORM) == QK_NORM_RMS;
  own.eps = side.eps;
  qk_frac frac[kCount];
  unsigned bad_pairs = 0;
  if (QK_ANGLE == QK_ANGLE_PHASE) read_frac<kCount>(p.plain.frac, work.first, frac);
  if (kBytes > 0 && p.prefetch) {
    const Heads heads = find<kBytes>(p, work);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= heads.count) continue;
      if (own.normed && p.prefetch & 1) fetch_row<kBytes>(side.x + heads.x + i * side.x_head, work);
      if (p.prefetch & 2) fetch_row<kBytes>(more.dy + heads.dy + i * more.dy_head, work);
    }
  }
  wait_for_previous();

  Batch<kBytes, kRows> now;
  float sums[2 * kCount] = {};
  Batch<kBytes, kRows> next;
  load(p, work, own.normed, now);
  read_weights<kBytes>(p, work, own);
  if (QK_ANGLE == QK_ANGLE_INV_FREQ) bad_pairs = read_inv_freq(p.plain, work.first, frac);
#pragma unroll 1
  for (int step = 0; step < more.steps; ++step) {
    if (kAhead) load(p, work, own.normed, next);
    finish(p, work, own, frac, bad_pairs, now, sums);
    if (kAhead)
      now = next;
    else if (step + 1 < more.steps)
      load(p, work, own.normed, now);
  }

  // 6. Sum: of all heads and tokens of the block.
  if (!kNormed || !more.parts) return;  // the whole block
  auto channel = [&](int e) {
    const int j = work.first + e / 2;
    return j >= kPairs ? -1 : e % 2 ? channel_b(j) : channel_a(j);
  };
  write_sums(sums, work.rank, channel, more.parts + block * (long long)kHeadDim);
}

[[maybe_unused]] constexpr bool kTight = kPowerOfTwo && !kPartly && QK_DTYPE != QK_F32 &&
                                         QK_Q_NORM == QK_K_NORM && QK_ANGLE != QK_ANGLE_INV_FREQ;
[[maybe_unused]] constexpr int kWarps = QK_BACKWARD_WARPS(kHeadDim, kTight);
[[maybe_unused]] constexpr int kRegisters = kWarps > 8 ? 65536 / 32 / kWarps / 8 * 8 : 255;

}  // namespace

#define QK_KERNEL(name, bytes, rows, ahead, registers)                                       \
  extern "C" __global__ void __maxnreg__(registers) name(const __grid_constant__ Launch p) { \
    run<bytes, rows, ahead>(p);                                                              \
  }

#if QK_VECTOR_BYTES
static_assert(kRuns, "vector loads");
#if QK_BACKWARD_ROWS(QK_HEAD_DIM) == 1
QK_KERNEL(qkrope_vector1, QK_VECTOR_BYTES, 1, kUnits < 4, kRegisters)
#else
QK_KERNEL(qkrope_vector2, QK_VECTOR_BYTES, 2, true, kRegisters)
#endif
#endif
QK_KERNEL(qkrope_scalar, 0, 1, false, 255)
