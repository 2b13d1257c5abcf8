// sums.cuh: sums over tokens, in an order that the launch alone decides: first over the lanes of a
// block, into its row of the workspace, then (the kernel qkrope_sums) over the rows.
#include "backward.h"
#include "lanes.cuh"

namespace {

// Adds what the groups of lanes of a block hold of each channel, and writes the row. Every thread
// calls it; `place` gives the channel of element e of a lane, or -1.
template <int kMany, typename Place>
__device__ __forceinline__ void write_sums(float (&sums)[kMany], int rank, Place&& place,
                                           float* row) {
  __shared__ float shared[QK_SUM_WARPS * kHeadDim];
#pragma unroll 1
  for (int group = 1; group < kGroups; ++group)
#pragma unroll
    for (int e = 0; e < kMany; ++e) {
      // Lanes of the first group alone go on with it; sums[] of the others stays theirs.
      const float other = __shfl_sync(kAllLanes, sums[e], group * kLanes + rank);
      if ((int)threadIdx.x < kLanes) sums[e] = qk::add(sums[e], other);
    }
  float* const mine = shared + threadIdx.y * kHeadDim;
  if ((int)threadIdx.x < kLanes) {
#pragma unroll
    for (int e = 0; e < kMany; ++e)
      if (place(e) >= 0) mine[place(e)] = sums[e];
  }
  __syncthreads();
  for (int c = threadIdx.y * 32 + threadIdx.x; c < kHeadDim; c += blockDim.y * 32) {
    float sum = shared[c];
    for (int warp = 1; warp < (int)blockDim.y; ++warp)
      sum = qk::add(sum, shared[warp * kHeadDim + c]);
    row[c] = sum;
  }
}

// A thread asks for so many rows at once that one wait is all, up to 1280 rows. Its block is small
// enough to be there, and wait, beside the blocks that write the rows. Columns are even in number,
// as the channels of a head are, and pairs of them aligned.
__device__ __forceinline__ void add_rows(const qk_sum& sum) {
  constexpr int kWarps = QK_SUM_THREADS / 32, kAtOnce = 5;
  const long long column = blockIdx.x * (long long)QK_SUM_COLUMNS;
  if (column >= sum.columns) return;  // the whole block
  __shared__ float shared[kWarps * QK_SUM_COLUMNS];
  float all[QK_SUM_COLUMNS] = {};
  const int first = threadIdx.y * 32 + threadIdx.x;
  const long long stride = QK_SUM_THREADS * sum.columns;
  const float* at = sum.parts + first * sum.columns + column;
  wait_for_previous();
#pragma unroll 1
  for (int row = first; row < sum.rows; row += kAtOnce * QK_SUM_THREADS) {
    unsigned words[kAtOnce][QK_SUM_COLUMNS];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      words[i][0] = words[i][1] = 0;
      if (row + i * QK_SUM_THREADS < sum.rows) load_run<QK_SUM_COLUMNS, 8>(at, words[i]);
      at += stride;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int c = 0; c < QK_SUM_COLUMNS; ++c)
        all[c] = qk::add(all[c], __uint_as_float(words[i][c]));
  }
#pragma unroll
  for (int step = 16; step; step /= 2)
#pragma unroll
    for (int i = 0; i < QK_SUM_COLUMNS; ++i)
      all[i] = qk::add(all[i], __shfl_xor_sync(kAllLanes, all[i], step));
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < QK_SUM_COLUMNS; ++i) shared[threadIdx.y * QK_SUM_COLUMNS + i] = all[i];
  }
  __syncthreads();
  if (first >= QK_SUM_COLUMNS || column + first >= sum.columns) return;
  float total = shared[first];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp)
    total = qk::add(total, shared[warp * QK_SUM_COLUMNS + first]);
  sum.to[column + first] = total;
}

}  // namespace

extern "C" __global__ void __maxnreg__(32) qkrope_sums(const __grid_constant__ qk_launch_sums p) {
  release_next();
  add_rows(p.sum[blockIdx.y]);
}
