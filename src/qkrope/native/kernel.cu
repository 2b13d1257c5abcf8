// kernel.cu: normalise, rotate and store Q and K. A group of lanes covers a head and stays on one
// token for a few heads of q or of k; a lane holds both channels of each of its pairs, so that the
// only thing lanes exchange is the sum of squares. The macros QK_HEAD_DIM, QK_ROTARY_DIM,
// QK_PAIRING, QK_DTYPE, QK_Q_NORM, QK_K_NORM, QK_Q_WEIGHT, QK_K_WEIGHT, QK_ANGLE, QK_VECTOR_BYTES
// are the variant.
#include "turns.cuh"

namespace {

// Sums over the lanes of a group, for kRows rows at once; every lane gets them. The tree is that of
// kLanes rounded up to a power of two with zeros, whatever the lanes hold.
template <int kRows>
__device__ __forceinline__ void group_sums(float (&sums)[kRows], int base, int rank) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int from = (rank ^ step) & ~(step - 1);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (kPowerOfTwo) {
        sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(kAllLanes, sums[i], step));
      } else {
        const float other = __shfl_sync(kAllLanes, sums[i], base + from);
        sums[i] = __fadd_rn(sums[i], from < kLanes ? other : 0.0f);
      }
    }
  }
}

// Programmatic dependent launch: the next kernel may start (it waits for our end by itself), and
// what the previous ones wrote is visible from here on.
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <int kRows, typename Row>
__device__ __forceinline__ void finish(const qk_launch_side& side, bool is_k, Row* rows,
                                       const Factors& f, int first, int base, int rank, int count,
                                       char* y) {
  float rstd[kRows];
  if (QK_Q_NORM == QK_NORM_RMS || QK_K_NORM == QK_NORM_RMS) {
    const bool normed = is_k ? QK_K_NORM == QK_NORM_RMS : QK_Q_NORM == QK_NORM_RMS;
#pragma unroll
    for (int i = 0; i < kRows; ++i) rstd[i] = rows[i].sum_of_squares();
    group_sums(rstd, base, rank);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      rstd[i] = normed ? rsqrtf(qk::fma(rstd[i], 1.0f / kHeadDim, side.eps)) : 1.0f;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float held_a = 0.0f, held_b = 0.0f;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float a = rows[i].a(j), b = rows[i].b(j);
      if (QK_Q_NORM == QK_NORM_RMS || QK_K_NORM == QK_NORM_RMS)
        a = qk::mul(a, rstd[i]), b = qk::mul(b, rstd[i]);
      // A channel that is not rotated must not see its company, which may be NaN.
      const bool turns = rotated(first, j);
      const float cross_b = turns ? b : 0.0f, cross_a = turns ? a : 0.0f;
      float ya, yb, unused;
      qk::rotate(a, cross_b, f.aa[j], f.ab[j], 0.0f, 0.0f, ya, unused);
      qk::rotate(cross_a, b, 0.0f, 0.0f, f.bb[j], f.ba[j], unused, yb);
      rows[i].set(j, ya, yb, held_a, held_b);
    }
    if (i < count) rows[i].store(y + i * side.y_head, first);
  }
}

template <int kType, int kBytes>
__device__ __forceinline__ void read_weight(const void* weight, int first,
                                            Share<kType, kBytes>& share) {
  if (weight)
    share.load((const char*)weight + share.place(first), first);
  else
    share.fill_ones();
}

template <int kBytes>
__device__ __forceinline__ void run(const qk_launch& p) {
  release_next();

  // 1. Place: which token, which heads of q or of k, which pairs of a head.
  const int group = threadIdx.x / kLanes, rank = threadIdx.x % kLanes, first = rank * kCount;
  const int is_k = (int)blockIdx.x >= p.q_slots;
  const qk_launch_side& side = p.side[is_k];
  const unsigned step = p.groups_on_tokens ? kGroups : 1;
  unsigned token = ((blockIdx.z * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y) * step;
  int slot = blockIdx.x - (is_k ? p.q_slots : 0);
  if (token >= p.tokens) return;  // the whole warp
  if (p.groups_on_tokens)
    token += group;
  else
    slot = slot * kGroups + group;
  const int base = slot * side.passes;
  int count = group < kGroups && token < p.tokens ? min(side.heads - base, side.passes) : 0;
  const Token at = locate(p, is_k, count > 0 ? token : 0);
  using Row = Share<QK_DTYPE, kBytes>;
  const char* x = side.x + at.x + base * side.x_head + Row::place(first);
  char* y = side.y + at.y + base * side.y_head + Row::place(first);

  // 2. What no earlier kernel on the stream can have written, before waiting for that kernel.
  qk_frac frac[kCount];
  if (QK_ANGLE == QK_ANGLE_PHASE && kEarlyFrac) read_frac(p.frac, first, frac);
  Share<QK_Q_WEIGHT, kBytes> q_weight;  // of k too, where it has the same type
  Share<QK_K_WEIGHT, kBytes> k_weight;
  constexpr bool kOneType = QK_Q_WEIGHT == QK_K_WEIGHT;
  auto read_weights = [&] {
    if (kOneType || !is_k)
      read_weight(side.weight, first, q_weight);
    else
      read_weight(side.weight, first, k_weight);
  };
  if (p.early_weights) read_weights();
  wait_for_previous();

  if (!p.early_weights) read_weights();

  // 3. Load: every head of the walk in flight at once, and the position.
  Row rows[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    rows[i].clear();
    if (i < count) rows[i].load(x + i * side.x_head, first);
  }
  int position = 0, high_word = 0;
  if (QK_ANGLE != QK_ANGLE_NONE && (QK_ANGLE != QK_ANGLE_TABLE || p.pos)) {
    position = *(const int*)(p.pos + at.pos);
    if (p.pos_wide) high_word = ((const int*)(p.pos + at.pos))[1];
  }

  // 4. Angles: once for the token, folded with the weights for every head of the walk.
  Factors factors;
  const bool bad = p.pos_wide && high_word != position >> 31;
  if (kOneType || !is_k)
    weigh(q_weight, side.weight_offset, factors);
  else
    weigh(k_weight, side.weight_offset, factors);
  if (QK_ANGLE == QK_ANGLE_PHASE && !kEarlyFrac) read_frac(p.frac, first, frac);
  unsigned bad_pairs = 0;
  if (QK_ANGLE == QK_ANGLE_INV_FREQ) bad_pairs = read_inv_freq(p, first, frac);
  if (QK_ANGLE == QK_ANGLE_TABLE)
    turn_by_table(p, at, position, bad, first, factors);
  else if (QK_ANGLE != QK_ANGLE_NONE)
    turn_by_phase(p, position, bad, first, frac, bad_pairs, factors);

  // 5. Finish: statistics of all heads, then normalise, rotate and store one after the other. No
  // store begins before every load is back: heads may share a cache line.
  if (side.passes == 1)
    finish<1>(side, is_k, rows, factors, first, group * kLanes, rank, count, y);
  else
    finish<kPasses>(side, is_k, rows, factors, first, group * kLanes, rank, count, y);
}

// A lane's runs are aligned and consecutive where both halves of the rotated part and of the rest
// are whole numbers of them.
[[maybe_unused]] constexpr bool kRuns =
    QK_UNITS(kHeadDim) % kUnits == 0 &&
    (kHalf ? kRotatedPairs % kCount == 0 && kPairs % kCount == 0 : kHeadDim % 8 == 0);

// Blocks an SM that ptxas must leave registers for: 9 are 56 registers, 7 are 72. Measured on
// sm_90; elsewhere the layouts are held to what spills nowhere.
[[maybe_unused]] constexpr bool kPlain = kUnits == 1 && kPowerOfTwo && !kPartly &&
                                         QK_Q_NORM == QK_K_NORM && QK_ANGLE != QK_ANGLE_INV_FREQ;
[[maybe_unused]] constexpr int kMinBlocks =
#if __CUDA_ARCH__ == 900
    QK_DTYPE == QK_F32 || kUnits > 2    ? 1
    : kUnits == 2                       ? (kPartly ? 5 : 7)
    : kPlain                            ? 9
    : kLanes >= 24 && kHalf && !kPartly ? 8
                                        : 7;
#elif __CUDA_ARCH__ >= 800
    QK_DTYPE == QK_F32 || kUnits > 1 ? 1
    : kPlain                         ? 9
                                     : 7;
#else
    1;
#endif

}  // namespace

#define QK_KERNEL(name, bytes, blocks)                                      \
  extern "C" __global__ void __launch_bounds__(32 * QK_BLOCK_WARPS, blocks) \
      name(const __grid_constant__ qk_launch p) {                           \
    run<bytes>(p);                                                          \
  }

#if QK_VECTOR_BYTES
static_assert(kRuns, "vector loads");
QK_KERNEL(qkrope_vector, QK_VECTOR_BYTES, kMinBlocks)
#endif
QK_KERNEL(qkrope_scalar, 0, 1)
