// team.cuh: RMS norms of whole rows where a call brings nothing beyond weights. The warps of a team
// share a token's heads; a lane holds kTeamRows heads, read once, and their weights with them.
#include "place.cuh"

namespace {

// Sides of one kind, no V, one rounding: the twin of Options.simple_rows.
static_assert(!QK_SIMPLE_ROWS || (kTeams && !QK_HAS_V && !QK_ROPE_FIRST && !QK_OUTPUT_HALF &&
                                  kSides[kQ].norm == QK_NORM_RMS && kind_of(kK) == kQ &&
                                  !Of<kQ>::kRounds && kFullLanes && kUnits == 1),
              "simple rows");

constexpr int kTeamRows = QK_FAST_TEAM_ROWS(kHeadDim, QK_DTYPE == QK_F32 ? 4 : 2);
// What spills nowhere and lets the most start.
[[maybe_unused]] constexpr int kTeamRegisters =
    QK_ANGLE == QK_ANGLE_TABLE || QK_ANGLE == QK_ANGLE_INV_FREQ ? 96 : 72;
static_assert(kTeamRegisters * 32 * QK_FAST_TEAM_WARPS <= 65536, "registers of a block");

template <int kBytes>
__device__ __forceinline__ void read_weights(const qk_launch_general& p, const Work& work,
                                             Row<kBytes> (&rows)[kTeamRows]) {
  const qk_launch_side& side = p.plain.side[work.side];
  const long long head = p.more[work.side].weight_head * Row<kBytes>::kSize;
#pragma unroll
  for (int i = 0; i < kTeamRows; ++i) {
    const int h = work.head + i * work.step;
    if (h < work.end && side.weight)
      rows[i].load((const char*)side.weight + h * head, work.first);
    else
      rows[i].fill_ones();
  }
}

template <int kBytes>
__device__ __forceinline__ void run_team(const qk_launch_general& p) {
  release_next();

  // 1. Place: which token, which heads, which pairs of a head.
  Work work;
  if (!place_in_team(p, work)) return;
  const qk_launch_side& side = p.plain.side[work.side];
  const int first = work.first;
  const Token at = locate(p, work.side, work.token);
  const char* const x = side.x + at.x + work.head * side.x_head;
  const long long x_step = work.step * side.x_head;

  // 2. What no earlier kernel on the stream can have written, before waiting for that kernel.
  Row<kBytes> weights[kTeamRows], rows[kTeamRows];
  qk_frac frac[kCount];
  unsigned bad_pairs = 0;
  if (p.plain.early_weights) read_weights(p, work, weights);
  wait_for_previous();

  // 3. Load: the position, on which the angles wait, and every head in flight at once.
  Place place = {{}, false};
  if (kRotates) place = read_place(p, p.plain.pos + at.pos);
#pragma unroll
  for (int i = 0; i < kTeamRows; ++i) {
    rows[i].clear();
    if (work.head + i * work.step < work.end) rows[i].load(x + i * x_step, first);
  }
  if (!p.plain.early_weights) read_weights(p, work, weights);

  // 4. The statistic of the row, and beside it the angles of the token.
  const Span all = {~0u, ~0u};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kTeamRows; ++i)
    sum = qk::add(sum, lane_sum<QK_NORM_RMS, float>(rows[i].values(), all, 0.0f));
  sum = team_sum<QK_FAST_TEAM_WARPS>(sum, work);
  const float by =
      scale_by<QK_NORM_RMS, QK_ROUND_ONCE>(sum, qk::mul(sum, p.row_share[work.side]), side.eps);
  Angles angles;
  if (kRotates && QK_ANGLE == QK_ANGLE_TABLE) {
    angles_of_table<kQ>(p.plain, place, at.cos, at.sin, first, angles);
  } else if (kRotates) {
    bad_pairs = read_frac(p.plain, first, frac);
    angles_of_phase<kQ>(place, p.plain.attention_factor, first, frac, bad_pairs, angles);
  }

  // 5. Finish: head by head normalise, rotate and store.
  char* const y = side.y + at.y + work.head * side.y_head;
  const long long y_step = work.step * side.y_head;
#pragma unroll
  for (int i = 0; i < kTeamRows; ++i) {
    if (work.head + i * work.step >= work.end) continue;
    Values v = rows[i].values(), w = weights[i].values();
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (side.weight_offset != 0.0f) {
        w.a[j] = qk::effective_weight(w.a[j], side.weight_offset);
        w.b[j] = qk::effective_weight(w.b[j], side.weight_offset);
      }
      v.a[j] = qk::mul(qk::mul(v.a[j], by), w.a[j]);
      v.b[j] = qk::mul(qk::mul(v.b[j], by), w.b[j]);
    }
    if (kRotates) turn<kQ>(angles, first, v);
    Row<kBytes>::template store<false>(y + i * y_step, first, v);
  }
}

}  // namespace
