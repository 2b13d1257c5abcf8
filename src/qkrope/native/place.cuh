// place.cuh: which heads of which token a warp of the general kernel serves, where they lie, and
// the sum over all warps that are on a token. The variant's macros come before it (see general.cu).
#include "angles.cuh"
#include "heads.cuh"

namespace {

// What a group of lanes serves: heads `head`, `head` + step and so on below `end`, of one token.
struct Work {
  int side, head, step, end;
  int first, rank, base;  // base: lane 0 of the group
  int team_begin, team_warps, chunks;
  bool turns;  // this token
  unsigned token;
};

[[maybe_unused]] __device__ __forceinline__ void place_in_head(Work& work) {
  const int group = threadIdx.x / kLanes;
  work.rank = threadIdx.x % kLanes, work.first = work.rank * kCount, work.base = group * kLanes;
}

// The token and the heads of this warp where teams share a token: false, and the whole block ends.
// Groups without a head, or without a token, stay for the barriers.
[[maybe_unused]] __device__ __forceinline__ bool place_in_team(const qk_launch_general& p,
                                                               Work& work) {
  place_in_head(work);
  const int group = threadIdx.x / kLanes;
  const long long block = (long long)blockIdx.y * gridDim.x + blockIdx.x;
  work.side = block < p.first_block[kK] ? kQ : !QK_HAS_V || block < p.first_block[kV] ? kK : kV;
  work.team_warps = p.team_warps[work.side];
  if (!work.team_warps) return false;  // one block too many of a grid in two dimensions
  const unsigned teams = p.teams[work.side];
  const unsigned team =
      teams == 1 ? threadIdx.y >= (unsigned)work.team_warps : threadIdx.y / work.team_warps;
  const long long at = (block - p.first_block[work.side]) * teams + team;
  work.team_begin = team < teams ? team * work.team_warps : 0;
  work.step = work.team_warps * kGroups;
  work.head = ((int)threadIdx.y - (int)(team * work.team_warps)) * kGroups + group;
  const bool idle = group >= kGroups || team >= teams || at >= p.plain.tokens;
  work.end = idle ? 0 : (work.side == kV ? p.v : p.plain.side[work.side]).heads;
  work.token = at >= p.plain.tokens ? p.plain.tokens - 1 : (unsigned)at;
  return true;
}

// Byte offsets of the token in x, y and pos, offsets in elements in the others.
struct Token {
  long long x, y, pos, cos, sin, scale;
};

__device__ __forceinline__ Token locate(const qk_launch_general& p, int side, unsigned token) {
  Token t = {0, 0, 0, 0, 0, 0};
  const qk_launch& plain = p.plain;
#pragma unroll 1
  for (int d = plain.ndim - 1; d >= 0; --d) {
    unsigned i = d ? token % plain.size[d] : token;
    if (d) token /= plain.size[d];
    t.x += i * p.x_dim[side][d], t.y += i * p.y_dim[side][d];
    t.pos += i * plain.pos_dim[d];
    if (QK_ANGLE == QK_ANGLE_TABLE) t.cos += i * plain.cos_dim[d], t.sin += i * plain.sin_dim[d];
    if (p.more[side].scale_of) t.scale += i * p.more[side].scale_dim[d];
  }
  return t;
}

// The sum over a token's warps of what each lane has, in an order that is the same for any batch.
// All threads of the block call it, once for each type.
template <int kWarps, typename Part>
__device__ __forceinline__ Part team_sum(Part x, const Work& work) {
  __shared__ Part sums[kWarps];
#pragma unroll
  for (int step = 16; step; step /= 2) x = join(x, shuffled(x, (threadIdx.x ^ step) % 32));
  if (threadIdx.x == 0) sums[threadIdx.y] = x;
  __syncthreads();
  x = {};
  if ((int)threadIdx.x < work.team_warps) x = sums[work.team_begin + threadIdx.x];
#pragma unroll
  for (int step = kWarps > 16 ? 16 : kWarps / 2; step; step /= 2)
    x = join(x, shuffled(x, (threadIdx.x ^ step) % 32));
  return shuffled(x, 0);
}

}  // namespace
