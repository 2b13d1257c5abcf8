// channels.cuh: which channels each pair of a head reads and writes, for every pairing, and which
// axis turns it. A lane's pairs are numbered as the lanes are: half pairings have the turning pairs
// first, and pair the other channels among themselves for company; interleaved ones go through the
// head in order. The variant's macros come before it (see general.cu).
#include "lanes.cuh"

namespace {

constexpr bool kTwoRuns = QK_PAIRING != QK_INTERLEAVED;  // a lane's a and b channels, or a b a b
constexpr bool kMoves = QK_OUTPUT_HALF;                  // pairs are written elsewhere than read
constexpr bool kRotates = QK_ANGLE != QK_ANGLE_NONE;
constexpr int kOffset = QK_OFFSET, kDistance = QK_DISTANCE;
constexpr int kQuarter = QK_PAIRING == QK_BLOCK_HALF ? kRotatedPairs / 2 : 0;
constexpr int kFirstTurning = kTwoRuns ? 0 : kOffset / 2;
// Channels between the turning a and b ones.
constexpr int kGap = QK_PAIRING == QK_HALF && kRotates ? kDistance - kRotatedPairs : 0;

// No lane holds pairs that turn and others both.
constexpr bool kWholeLanes = kFirstTurning % kCount == 0 && kRotatedPairs % kCount == 0;
constexpr bool kFullLanes = kPairs % kCount == 0;

// Whether pair j turns; the first that does is number 0 of the frequencies.
__device__ constexpr bool rotated(int j) {
  return j >= kFirstTurning && j < kFirstTurning + kRotatedPairs;
}
// The same of a lane's pair i.
__device__ __forceinline__ bool turns(int first, int i) {
  if (kRotatedPairs == kPairs) return true;
  return rotated(first + (kWholeLanes ? 0 : i));
}

// The channel that is number m of those that no half pairing turns.
__device__ constexpr int unturned(int m) {
  return m < kOffset ? m : m < kOffset + kGap ? m + kRotatedPairs : m + kRotary;
}
__device__ constexpr int in_a(int j) {
  if (!kTwoRuns) return 2 * j;
  if (j >= kRotatedPairs) return unturned(j - kRotatedPairs);
  return kOffset + j + (QK_PAIRING == QK_BLOCK_HALF && j >= kQuarter ? kQuarter : 0);
}
__device__ constexpr int in_b(int j) {
  if (!kTwoRuns) return 2 * j + 1;
  return j < kRotatedPairs ? in_a(j) + kDistance : unturned(j + kPairs - 2 * kRotatedPairs);
}
template <bool kMove>
__device__ constexpr int out_a(int j) {
  return kMove && rotated(j) ? kOffset + j - kFirstTurning : in_a(j);
}
template <bool kMove>
__device__ constexpr int out_b(int j) {
  return kMove && rotated(j) ? out_a<kMove>(j) + kRotatedPairs : in_b(j);
}
// The entries of a table with one a channel: as many as turn, in the order of the written channels.
__device__ constexpr int entry_a(int j) {
  return QK_PAIRING == QK_HALF ? j : out_a<kMoves>(j) - kOffset;
}
__device__ constexpr int entry_b(int j) {
  return QK_PAIRING == QK_HALF ? kRotatedPairs + j : out_b<kMoves>(j) - kOffset;
}

// ---- axes of positions ------------------------------------------------------------------------

constexpr int kAxes = QK_AXES;                            // 0: positions have none
constexpr int kAxisPairs[QK_MAX_AXES] = {QK_AXIS_PAIRS};  // turning pairs that each takes

__device__ constexpr int pairs_before(int axis) {
  int sum = 0;
  for (int a = 0; a < axis; ++a) sum += kAxisPairs[a];
  return sum;
}

// The axis whose position turns number r of the turning pairs.
__device__ __forceinline__ int axis_of(int r) {
  if constexpr (QK_AXES_INTERLEAVED) {
    constexpr int kTurn = kAxes > 0 ? kAxes : 1;
    const int a = r % kTurn;
    const int end = a == 0   ? 0
                    : a == 1 ? kTurn * kAxisPairs[1]
                    : a == 2 ? kTurn * kAxisPairs[2]
                             : kTurn * kAxisPairs[3];
    return r < end ? a : 0;
  } else {
    int axis = 0;
#pragma unroll
    for (int a = 1; a < kAxes; ++a) axis += r >= pairs_before(a);
    return axis;
  }
}

// ---- limits -----------------------------------------------------------------------------------

// Whether each lane reads and writes its channels as runs of whole vectors.
__device__ constexpr bool runs(int from, int count, int (*channel)(int)) {
  for (int i = 0; i < count; ++i)
    if (channel(from + i) != channel(from) + i) return false;
  return channel(from) % count == 0;
}
__device__ constexpr bool runs_in_order(int from, int (*a)(int), int (*b)(int)) {
  for (int i = 0; i < kCount; ++i)
    if (a(from + i) != a(from) + 2 * i || b(from + i) != a(from) + 2 * i + 1) return false;
  return a(from) % (2 * kCount) == 0;
}
__device__ constexpr bool lanes_are_whole() {
  bool whole = kFullLanes && (kWholeLanes || !kMoves);
  for (int from = 0; whole && from < kPairs; from += kCount) {
    const bool two = kTwoRuns || (kMoves && rotated(from));
    whole = (kTwoRuns ? runs(from, kCount, in_a) && runs(from, kCount, in_b)
                      : runs_in_order(from, in_a, in_b)) &&
            (two ? runs(from, kCount, out_a<kMoves>) && runs(from, kCount, out_b<kMoves>)
                 : runs_in_order(from, out_a<kMoves>, out_b<kMoves>));
  }
  return whole;
}
__device__ constexpr int last_channel() {
  int last = 0;
  for (int j = kFirstTurning; j < kFirstTurning + kRotatedPairs; ++j)
    last = in_b(j) > last ? in_b(j) : last;
  return last;
}

static_assert(!QK_VECTOR_BYTES || lanes_are_whole(), "vector loads");
static_assert(kOffset >= 0 && kOffset % 2 == 0 && last_channel() < kHeadDim, "offset");
static_assert(kGap >= 0, "pair_distance");
static_assert(QK_PAIRING != QK_BLOCK_HALF || kRotary % 4 == 0, "block_half");
static_assert(!kMoves || !kTwoRuns, "output_pairing");
static_assert(kAxes == 0 || (kAxes >= 2 && kAxes <= QK_MAX_AXES), "axes");
static_assert(kAxes == 0 || pairs_before(kAxes) == kRotatedPairs, "axes");

}  // namespace
