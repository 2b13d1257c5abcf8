// kernel.cu: normalise, rotate and store Q and K. A group of lanes covers a head and stays on one
// token for a few heads of q or of k; a lane holds both channels of each of its pairs, so that the
// only thing lanes exchange is the sum of squares. The macros QK_HEAD_DIM, QK_ROTARY_DIM,
// QK_PAIRING, QK_DTYPE, QK_Q_NORM, QK_K_NORM, QK_Q_WEIGHT, QK_K_WEIGHT, QK_ANGLE, QK_VECTOR_BYTES
// are the variant.
#include "turns.cuh"

namespace {

template <int kRows>
constexpr bool kOnTokens = QK_ON_TOKENS(kHeadDim, kRows);
// Both groups of a warp are on one token, and may share the work of its angles.
template <int kRows>
constexpr bool kShared = !kOnTokens<kRows> && kGroups == 2 && kCount == 4 && kWholeLanes &&
                         QK_ANGLE == QK_ANGLE_PHASE && QK_DTYPE != QK_F32;

// What a group of lanes knows before it may read what earlier kernels wrote.
struct Work {
  int is_k, first, rank, group, base;  // base: lane 0 of the group
  int count;                           // heads to serve, 0 for a group that has none
  const char* x;
  char* y;
  Token at;
  qk_frac frac[kCount];
  Factors factors;  // of the rotation and weights; so far, if at all, the weights alone
};

template <int kType, int kBytes>
__device__ __forceinline__ void read_weight(const void* weight, float offset, Work& work) {
  Share<kType, kBytes> share;
  if (weight)
    share.load((const char*)weight + share.place(work.first), work.first);
  else
    share.fill_ones();
  weigh(share, offset, work.factors);
}

template <int kBytes>
__device__ __forceinline__ void read_weights(const qk_launch_side& side, Work& work) {
  if (QK_Q_WEIGHT == QK_K_WEIGHT || !work.is_k)
    read_weight<QK_Q_WEIGHT, kBytes>(side.weight, side.weight_offset, work);
  else
    read_weight<QK_K_WEIGHT, kBytes>(side.weight, side.weight_offset, work);
}

// turn_by_phase where both groups of a warp are on one token: each takes two of a lane's four pairs
// (work.frac[0] and [1] are theirs) and tells the other.
__device__ __forceinline__ void turn_together(int position, float factor, const Work& work,
                                              Factors& f) {
  const int other = work.group ? work.base - kLanes + work.rank : kLanes + work.rank;
  float s[2], c[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sincos_of_phase(qk::phase(position, work.frac[i].lo, work.frac[i].hi), s[i], c[i]);
    if (!kScaled && factor != 1.0f) s[i] = qk::mul(s[i], factor), c[i] = qk::mul(c[i], factor);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float so = __shfl_sync(kAllLanes, s[i], other), co = __shfl_sync(kAllLanes, c[i], other);
    if (kPartly && work.first >= kRotatedPairs) continue;
    const bool second = work.group;
    turn(i, second ? co : c[i], second ? so : s[i], second ? co : c[i], second ? so : s[i], f);
    turn(i + 2, second ? c[i] : co, second ? s[i] : so, second ? c[i] : co, second ? s[i] : so, f);
  }
}

template <int kBytes, int kRows>
__device__ __forceinline__ void serve(const qk_launch& p, Work& work) {
  const qk_launch_side& side = p.side[work.is_k];
  const int first = work.first;
  using Row = Share<QK_DTYPE, kBytes>;
  Row rows[kRows];
  const char* from[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    from[i] = work.x + i * side.x_head;
    settle(from[i]);
    rows[i].clear();
  }
  const char* pos = p.pos + work.at.pos;
  settle(pos);
  wait_for_previous();
  // Again, for no other effect than that the compiler moves neither loads nor addresses across: the
  // frequencies come before the wait, and what follows it goes out together.
  release_next();

  // 3. Load: the position, on which the angles wait, and every head of the walk in flight at once.
  int position = 0, high_word = 0;
  if (QK_ANGLE != QK_ANGLE_NONE && (QK_ANGLE != QK_ANGLE_TABLE || p.pos)) {
    position = *(const int*)pos;
    if (p.pos_wide) high_word = ((const int*)pos)[1];
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (i < work.count) rows[i].load(from[i], first);
  if (!p.early_weights) read_weights<kBytes>(side, work);

  // 4. Angles: once for the token, folded with the weights for every head of the walk.
  const bool bad = p.pos_wide && high_word != position >> 31;
  const float factor = bad ? QK_NAN : p.attention_factor;
  Factors& f = work.factors;
  if (QK_ANGLE == QK_ANGLE_PHASE && !kEarlyFrac) read_frac<kCount>(p.frac, first, work.frac);
  unsigned bad_pairs = 0;
  if (QK_ANGLE == QK_ANGLE_INV_FREQ) bad_pairs = read_inv_freq(p, first, work.frac);
  if (QK_ANGLE == QK_ANGLE_TABLE)
    turn_by_table(p, work.at, position, bad, first, f);
  else if (kShared<kRows>)
    turn_together(position, kScaled ? 1.0f : factor, work, f);
  else if (QK_ANGLE != QK_ANGLE_NONE)
    turn_by_phase(position, kScaled ? 1.0f : factor, first, work.frac, bad_pairs, f);

  // 5. Finish. The rotation needs no statistic, so it fills the time in which lanes exchange sums.
  // No store begins before every load is back: heads may share a cache line.
  float scale[kRows], ya[kRows][kCount], yb[kRows][kCount];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    scale[i] = rows[i].sum_of_squares();
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      // A channel that is not rotated must not see its company, which may be NaN.
      const float a = rows[i].a(j), b = rows[i].b(j);
      const bool turns = rotated(first, j);
      float unused;
      qk::rotate(a, turns ? b : 0.0f, f.aa[j], f.ab[j], 0.0f, 0.0f, ya[i][j], unused);
      qk::rotate(turns ? a : 0.0f, b, 0.0f, 0.0f, f.bb[j], f.ba[j], unused, yb[i][j]);
    }
  }
  if (kNormed) {
    const bool normed = work.is_k ? QK_K_NORM == QK_NORM_RMS : QK_Q_NORM == QK_NORM_RMS;
    group_sums(scale, work.base, work.rank);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      scale[i] = normed ? rsqrtf(qk::fma(scale[i], 1.0f / kHeadDim, side.eps)) : 1.0f;
      if (kScaled) scale[i] = qk::mul(scale[i], factor);
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float held_a = 0.0f, held_b = 0.0f;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float by = kNormed ? scale[i] : 1.0f;
      rows[i].set(j, qk::mul(ya[i][j], by), qk::mul(yb[i][j], by), held_a, held_b);
    }
    if (i < work.count) rows[i].store(work.y + i * side.y_head, first);
  }
}

template <int kBytes, int kRows>
__device__ __forceinline__ void run(const qk_launch& p) {
  release_next();

  // 1. Place: which token, which heads of q or of k, which pairs of a head.
  Work work;
  const int group = threadIdx.x / kLanes;
  work.rank = threadIdx.x % kLanes, work.first = work.rank * kCount, work.base = group * kLanes;
  work.group = group;
  int slot = blockIdx.x * blockDim.y + threadIdx.y;
  unsigned token = blockIdx.z * gridDim.y + blockIdx.y;
  if (kOnTokens<kRows>) token *= kGroups;
  if (token >= p.tokens || slot >= p.slots) return;  // the whole warp
  work.is_k = slot >= p.q_slots;
  const qk_launch_side& side = p.side[work.is_k];
  if (work.is_k) slot -= p.q_slots;
  if (kOnTokens<kRows>)
    token += group;
  else
    slot = slot * kGroups + group;
  const int head = slot * side.passes;
  work.count = group < kGroups && token < p.tokens ? min(side.heads - head, side.passes) : 0;
  work.at = locate(p, work.is_k, min(token, p.tokens - 1));
  const int place = Share<QK_DTYPE, kBytes>::place(work.first);
  work.x = side.x + work.at.x + head * side.x_head + place;
  work.y = side.y + work.at.y + head * side.y_head + place;

  // 2. What no earlier kernel on the stream can have written, before waiting for that kernel.
  if (kShared<kRows>)
    read_frac<2>(p.frac, work.first + (work.group ? 2 : 0), work.frac);
  else if (QK_ANGLE == QK_ANGLE_PHASE && kEarlyFrac)
    read_frac<kCount>(p.frac, work.first, work.frac);
  if (p.early_weights) {
    read_weights<kBytes>(side, work);
#pragma unroll
    for (int i = 0; i < kCount; ++i) settle(work.factors.aa[i]), settle(work.factors.bb[i]);
  }
  serve<kBytes, kRows>(p, work);
}

// Registers a thread may have, so that the warps of this call and of the next fit beside each other
// (docs/kernel.md); where a layout needs more than the plain one, what spills nowhere.
[[maybe_unused]] constexpr bool kPlain = kUnits == 1 && kPowerOfTwo && !kPartly &&
                                         QK_DTYPE != QK_F32 && QK_Q_NORM == QK_K_NORM &&
                                         QK_ANGLE != QK_ANGLE_INV_FREQ;
template <int kRows>
constexpr int kRegisters = kUnits > 2    ? 255
                           : kUnits == 2 ? 96
                           : !kPlain     ? (kRows == 4 && QK_ANGLE != QK_ANGLE_INV_FREQ ? 72 : 96)
                           : kRows == 4  ? (__CUDA_ARCH__ == 900 ? 56 : 64)
                                         : 32 + 8 * kRows;

}  // namespace

#define QK_KERNEL(name, bytes, rows, registers)                                                 \
  extern "C" __global__ void __maxnreg__(registers) name(const __grid_constant__ qk_launch p) { \
    run<bytes, rows>(p);                                                                        \
  }

#if QK_VECTOR_BYTES
static_assert(kRuns, "vector loads");
QK_KERNEL(qkrope_vector1, QK_VECTOR_BYTES, 1, kRegisters<1>)
QK_KERNEL(qkrope_vector2, QK_VECTOR_BYTES, 2, kRegisters<2>)
#if QK_PASSES(QK_HEAD_DIM) == 4
QK_KERNEL(qkrope_vector4, QK_VECTOR_BYTES, 4, kRegisters<4>)
#endif
#endif
QK_KERNEL(qkrope_scalar, 0, kPasses, 255)
