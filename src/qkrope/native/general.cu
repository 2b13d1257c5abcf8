// general.cu: the kernel of every Spec and call that kernel.cu does not run. Lanes share a head as
// there, in the same five phases; a variant with a norm of whole rows keeps all heads of a token in
// one block, whose warps add their sums through shared memory. The macros QK_HEAD_DIM,
// QK_ROTARY_DIM, QK_PAIRING, QK_DTYPE, QK_ANGLE, QK_VECTOR_BYTES, QK_OFFSET, QK_DISTANCE,
// QK_OUTPUT_HALF, QK_ROPE_FIRST, QK_REVERSE, QK_AXES, QK_AXIS_PAIRS, QK_AXES_INTERLEAVED, QK_SIDES,
// QK_HAS_V are the variant.
#include "team.cuh"

namespace {

// The sum over all heads of a token of x, or of the squares of x - mean; `values` gives row i of
// those from `head` on, which `load` brings where they are not all held at once.
template <int kNorm, typename Part, int kRows, typename Load, typename Value>
__device__ __forceinline__ Part row_sum(const Work& work, Load& load, Value& values,
                                        const Span& span, float mean) {
  Part sum = {};
  for (int chunk = 0; chunk < work.chunks; ++chunk) {
    const int head = work.head + chunk * kRows * work.step;
    if (work.chunks > 1) load(chunk * kRows);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int h = head + i * work.step;
      const Part part = lane_sum<kNorm, Part>(values(i, h), span, mean);
      if (h < work.end) sum = join(sum, part);
    }
  }
  return team_sum<QK_TEAM_WARPS(kHeadDim)>(sum, work);
}

// The statistic of each head that a group of lanes holds, over so many channels.
template <int kNorm, int kRounding, int kChannels, int kRows, typename Value>
__device__ __forceinline__ void statistics(const Work& work, Value& values, const Span& span,
                                           float eps, int head, Statistic (&to)[kRows]) {
  constexpr float kShare = 1.0f / kChannels;
  float squares[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) to[i].mean = 0.0f;
  if constexpr (kNorm == QK_NORM_LAYER) {
    Sum sums[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      sums[i] = lane_sum<QK_NORM_NONE, Sum>(values(i, head + i * work.step), span, 0.0f);
    group_sums(sums, work.base, work.rank);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      to[i].mean = qk::mul(qk::add(sums[i].high, sums[i].low), kShare);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    squares[i] = lane_sum<kNorm, float>(values(i, head + i * work.step), span, to[i].mean);
  group_sums(squares, work.base, work.rank);
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    to[i].by = scale_by<kNorm, kRounding>(squares[i], qk::mul(squares[i], kShare), eps);
}

template <int kSide, int kBytes, int kRows, int kMost>
__device__ __forceinline__ void serve(const qk_launch_general& p, const qk_launch_side& side,
                                      const Work& work) {
  using Is = Of<kSide>;
  constexpr bool kPhase = QK_ANGLE == QK_ANGLE_PHASE, kTable = QK_ANGLE == QK_ANGLE_TABLE;
  constexpr bool kChunks = kTeams || kRows < kMost;
  const qk_launch_extra& more = p.more[work.side];
  const int first = work.first;
  const Token at = locate(p, work.side, work.token);

  // 2. What no earlier kernel on the stream can have written, before waiting for that kernel.
  qk_frac frac[kCount];
  Values weight;
  unsigned bad_pairs = 0;
  const bool early = p.plain.early_weights && !more.weight_head;
  if (Is::kTurns && kPhase && kEarlyFrac) read_frac(p.plain, first, frac);
  if (Is::kNorm != QK_NORM_NONE && early)
    read_weight<kSide, kBytes>(side, more, side.weight, first, weight);
  wait_for_previous();

  // 3. Load: the position, on which the angles wait, and every head in flight at once.
  Place place = {{}, false};
  if (Is::kTurns && work.turns) place = read_place(p, p.plain.pos + at.pos);
  Row<kBytes> rows[kRows];
  // From where the group's heads are, and to the next of them, so that a head takes one addition.
  const char* const x = side.x + at.x + work.head * side.x_head;
  const long long x_step = work.step * side.x_head;
  auto load = [&](int row) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      rows[i].clear();
      if (work.head + (row + i) * work.step < work.end) rows[i].load(x + (row + i) * x_step, first);
    }
  };
  load(0);
  if (Is::kNorm != QK_NORM_NONE && !early && !more.weight_head)
    read_weight<kSide, kBytes>(side, more, side.weight, first, weight);

  // 4. Angles: once for the token, unless each head has its own.
  Angles angles;
  auto set_angles = [&](int head) {
    if (kTable)
      angles_of_table<kSide>(p.plain, place, at.cos + head * p.cos_head, at.sin + head * p.sin_head,
                             first, angles);
    else
      angles_of_phase<kSide>(place, p.plain.attention_factor, first, frac, bad_pairs, angles);
  };
  if (Is::kTurns && !kTable && !(kPhase && kEarlyFrac)) bad_pairs = read_frac(p.plain, first, frac);
  if (Is::kTurns && work.turns && !(kTable && p.table_heads)) set_angles(0);
  auto turned = [&](Values& v, int head) {
    if (!Is::kTurns || !work.turns) return;
    if (kTable && p.table_heads) set_angles(head < work.end ? head : 0);
    turn<kSide>(angles, first, v);
  };
  // Row i as the norm sees it.
  auto values = [&](int i, int head) {
    Values v = rows[i].values();
    if (QK_ROPE_FIRST) turned(v, head);
    return v;
  };

  // 5. Finish: the statistic, of a row first; then head by head normalise, rotate and store.
  const Span span = span_of<kSide, false>(first), others = span_of<kSide, true>(first);
  Statistic whole[kRows] = {}, rest[kRows] = {};
  if constexpr (Is::kRow) {
    const float share = p.row_share[work.side];
    Statistic all = {0.0f, 0.0f};
    if constexpr (Is::kNorm == QK_NORM_LAYER) {
      const Sum sum = row_sum<QK_NORM_NONE, Sum, kRows>(work, load, values, span, 0.0f);
      all.mean = qk::mul(qk::add(sum.high, sum.low), share);
    }
    const float squares = row_sum<Is::kNorm, float, kRows>(work, load, values, span, all.mean);
    all.by = scale_by<Is::kNorm, Is::kSpec.round_norm>(squares, qk::mul(squares, share), side.eps);
#pragma unroll
    for (int i = 0; i < kRows; ++i) whole[i] = all;
  }
  char* const y = side.y + at.y + work.head * side.y_head;
  const long long y_step = work.step * side.y_head;
  const int weight_size = more.weight_dtype == QK_F32 ? 4 : 2;
  const char* const own = (const char*)side.weight + work.head * more.weight_head * weight_size;
  const long long own_step = work.step * more.weight_head * weight_size;
  for (int chunk = 0; chunk < (kChunks ? work.chunks : 1); ++chunk) {
    const int row = chunk * kRows, head = work.head + row * work.step;
    if (kChunks && work.chunks > 1) load(row);
    if constexpr (Is::kNorm != QK_NORM_NONE && !Is::kRow)
      statistics<Is::kNorm, Is::kSpec.round_norm, Is::kSpec.dim>(work, values, span, side.eps, head,
                                                                 whole);
    if constexpr (Is::kRest != QK_NORM_NONE)
      statistics<Is::kRest, Is::kSpec.round_norm, kHeadDim - Is::kSpec.dim>(
          work, values, others, more.rest_eps, head, rest);
    if (Is::kMove) __syncwarp();  // in place, a lane writes what another has read
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int h = head + i * work.step;
      if (h >= work.end) continue;
      Values v = values(i, h);
      if constexpr (Is::kNorm != QK_NORM_NONE) {
        Values bias;
        if (more.weight_head)
          read_weight<kSide, kBytes>(side, more, own + (row + i) * own_step, first, weight);
        if (more.bias) {
          const char* from = row_of(more.bias, more.bias_dtype, h * more.bias_head);
          read_channels<kSide, kBytes>(from, more.bias_dtype, first, 0.0f, bias);
          if (Is::kSteps) round_all(bias);
        }
        normalise_all<kSide>(v, span, whole[i], rest[i], weight, bias, more.bias);
      }
      if (more.scale_of || more.scale != 1.0f) scale_all<kSide>(more, at.scale, h, first, v);
      if (!QK_ROPE_FIRST) turned(v, h);
      Row<kBytes>::template store<Is::kMove>(y + (row + i) * y_step, first, v);
    }
  }
}

// Groups serve up to kMost heads (a team's as many as there are), kRows at once.
template <int kBytes, int kRows, int kMost>
__device__ __forceinline__ void run(const qk_launch_general& p) {
  release_next();

  // 1. Place: which token, which heads of q, k or v, which pairs of a head.
  Work work;
  work.team_begin = work.team_warps = work.chunks = 1;
  if (kTeams) {
    if (!place_in_team(p, work)) return;
  } else {
    place_in_head(work);
    constexpr bool kOnTokens = QK_ON_TOKENS(kHeadDim, kMost);
    const int x = blockIdx.x * blockDim.y + threadIdx.y, group = threadIdx.x / kLanes;
    work.side = x < p.plain.q_slots ? kQ : !QK_HAS_V || x < p.k_slots ? kK : kV;
    work.token = blockIdx.z * gridDim.y + blockIdx.y;
    if (kOnTokens) work.token *= kGroups;
    if (work.token >= p.plain.tokens || x >= p.plain.slots) return;  // the whole warp
    int slot = x - (work.side == kQ ? 0 : work.side == kK ? p.plain.q_slots : p.k_slots);
    if (kOnTokens)
      work.token += group;
    else
      slot = slot * kGroups + group;
    work.step = 1, work.head = slot;  // of so many passes, below
  }
  const qk_launch_side& side = work.side == kV ? p.v : p.plain.side[work.side];
  if (kTeams) {
    const int heads = work.step * kRows;
    work.chunks = (side.heads + heads - 1) / heads;
  } else {
    work.head *= side.passes;
    work.end = min(side.heads, work.head + side.passes);
    work.chunks = (side.passes + kRows - 1) / kRows;
    if (threadIdx.x / kLanes >= kGroups || work.token >= p.plain.tokens) work.end = 0;
    work.token = min(work.token, p.plain.tokens - 1);
  }
  work.turns = true;
  if (p.ranged) {
    const unsigned index = work.token % p.last_size;
    work.turns = index >= p.rotate_from && index < p.rotate_to;
  }

  const int kind = work.side == kQ ? kQ : work.side == kK ? kind_of(kK) : kind_of(kV);
  if (kind == kQ) return serve<kQ, kBytes, kRows, kMost>(p, side, work);
  if constexpr (kind_of(kK) == kK)
    if (kind == kK) return serve<kK, kBytes, kRows, kMost>(p, side, work);
  if constexpr (QK_HAS_V && kind_of(kV) == kV)
    if (kind == kV) serve<kV, kBytes, kRows, kMost>(p, side, work);
}

// Registers a thread may have: of a team, what lets its largest block start.
[[maybe_unused]] constexpr int kRegisters = kTeams && kUnits < 4 ? 128 : kUnits == 1 ? 128 : 255;

}  // namespace

#define QK_KERNEL(name, bytes, rows, most)                \
  extern "C" __global__ void __maxnreg__(kRegisters)      \
      name(const __grid_constant__ qk_launch_general p) { \
    run<bytes, rows, most>(p);                            \
  }

static_assert(QK_ROWS == kTeams, "scope");
#if QK_VECTOR_BYTES && QK_ROWS
QK_KERNEL(qkrope_vector1, QK_VECTOR_BYTES, QK_TEAM_ROWS(kHeadDim), QK_TEAM_ROWS(kHeadDim))
#if QK_SIMPLE_ROWS
extern "C" __global__ void __maxnreg__(kTeamRegisters)
    qkrope_vector2(const __grid_constant__ qk_launch_general p) {
  run_team<QK_VECTOR_BYTES>(p);
}
#endif
#elif QK_VECTOR_BYTES
QK_KERNEL(qkrope_vector1, QK_VECTOR_BYTES, 1, 1)
#if QK_PASSES(QK_HEAD_DIM) == 4
QK_KERNEL(qkrope_vector4, QK_VECTOR_BYTES, 4, 4)
#else
QK_KERNEL(qkrope_vector2, QK_VECTOR_BYTES, 2, 2)
#endif
#endif
QK_KERNEL(qkrope_scalar, 0, 1, kPasses)
