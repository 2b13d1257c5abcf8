// backward_general.cu: the gradients of what general.cu computes, for every Spec and call. Lanes
// share a head as there. A warp keeps the same heads for the whole call and goes from token to
// token, so that the sums of a weight's gradient, one for all heads or one a head, stay in its
// registers; where a norm is of whole rows, a team of warps has all heads of a token. The macros
// are those of general.cu.
#include "angles.cuh"
#include "heads.cuh"
#include "slopes.cuh"
#include "sums.cuh"

namespace {

using Launch = qk_launch_backward_general;

// What a group of lanes serves: heads `head`, `head` + step and so on below `end`, of a token that
// is step_tokens further each time.
struct Work {
  int side, first_head, head, step, end, chunks;  // first_head: of the block
  int first, rank, base, group;                   // base: lane 0 of the group
  int team_begin, team_warps;
  unsigned row, slot;  // which tokens and which heads the block has
  unsigned token, step_tokens;
};

// A token that is served: byte offsets in x, dy, dx and pos, in elements in the others.
struct Token {
  long long x, dy, dx, cos, sin, scale;
  Place place;
  bool there, turns;
};

__device__ __forceinline__ Token locate(const Launch& p, int side, unsigned token) {
  const qk_launch_general& g = p.base;
  const qk_launch& plain = g.plain;
  Token t = {0, 0, 0, 0, 0, 0, {{}, false}, token < plain.tokens, true};
  token = min(token, plain.tokens - 1);
  if (g.ranged) {
    const unsigned index = token % g.last_size;
    t.turns = index >= g.rotate_from && index < g.rotate_to;
  }
  long long pos = 0;
#pragma unroll 1
  for (int d = plain.ndim - 1; d >= 0; --d) {
    const unsigned i = d ? token % plain.size[d] : token;
    if (d) token /= plain.size[d];
    t.x += i * g.x_dim[side][d], t.dx += i * g.y_dim[side][d], t.dy += i * p.dy_dim[side][d];
    pos += i * plain.pos_dim[d];
    if (QK_ANGLE == QK_ANGLE_TABLE) t.cos += i * plain.cos_dim[d], t.sin += i * plain.sin_dim[d];
    if (g.more[side].scale_of) t.scale += i * g.more[side].scale_dim[d];
  }
  if (kRotates && side != kV && t.turns) t.place = read_place(g, plain.pos + pos);
  return t;
}

template <int kSide>
__device__ __forceinline__ void turn_back(const Angles& by, int first, Values& v) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float a, b;
    qk::rotate_back(v.a[i], v.b[i], by.cos_a[i], by.sin_a[i], by.cos_b(i), by.sin_b(i), a, b);
    if (turns(first, i)) v.a[i] = a, v.b[i] = b;
  }
}

// Where a block's sums meet: a row for each group of lanes.
__device__ __forceinline__ float* shared_sums() {
  constexpr int kWarps = kTeams ? QK_TEAM_WARPS(kHeadDim) : QK_GENERAL_SUM_WARPS;  // of a block
  __shared__ float sums[kWarps * kGroups * kHeadDim];
  return sums;
}

// ---- the walk ----------------------------------------------------------------------------------

template <int kSide, int kBytes, int kRows>
struct Walk {
  using Is = Of<kSide>;
  const Launch& p;
  const qk_launch_side& side;
  const qk_launch_extra& more;
  const qk_backward_general_side& grads;
  const Work& work;
  Span span, others;
  Values x[kRows], g[kRows], weight;  // x as the norm sees it, g the gradient of what it gives
  Angles angles;
  float weights[kRows][2 * kCount], biases[kRows][2 * kCount];  // sums; a and b in turn

  __device__ __forceinline__ int head_of(int chunk, int i) const {
    return work.head + (chunk * kRows + i) * work.step;
  }

  __device__ __forceinline__ void set_angles(const Token& token, int head) {
    if (QK_ANGLE == QK_ANGLE_TABLE) {
      angles_of_table<kSide>(p.base.plain, token.place, token.cos + head * p.base.cos_head,
                             token.sin + head * p.base.sin_head, work.first, angles);
    } else {
      qk_frac frac[kCount];
      const unsigned bad = read_frac(p.base.plain, work.first, frac);
      angles_of_phase<kSide>(token.place, p.base.plain.attention_factor, work.first, frac, bad,
                             angles);
    }
  }
  // Angles are the token's, or made for each head: where it has its own, and where registers do not
  // allow to hold them.
  __device__ __forceinline__ bool each_turns() const {
    return kUnits == 4 || (QK_ANGLE == QK_ANGLE_TABLE && p.base.table_heads);
  }
  __device__ __forceinline__ bool turns_at(const Token& token, int head) {
    if (!Is::kTurns || !token.turns) return false;
    if (each_turns()) set_angles(token, head < work.end ? head : work.first_head);
    return true;
  }

  __device__ __forceinline__ void load(const Token& token, int chunk) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int head = head_of(chunk, i);
      x[i] = {}, g[i] = {};
      if (head >= work.end || !token.there) continue;
      if (Is::kNorm != QK_NORM_NONE)
        x[i] = Row<kBytes>::template read<false>(side.x + token.x + head * side.x_head, work.first);
      g[i] = Row<kBytes>::template read<Is::kMove>(grads.dy + token.dy + head * grads.dy_head,
                                                   work.first);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int head = head_of(chunk, i);
      if (turns_at(token, head)) {
        if (QK_ROPE_FIRST)
          turn<kSide>(angles, work.first, x[i]);
        else
          turn_back<kSide>(angles, work.first, g[i]);
      }
      if (head < work.end && (more.scale_of || more.scale != 1.0f))
        scale_all<kSide>(more, token.scale, head, work.first, g[i]);
    }
  }

  // Held for the whole walk, or read each time where registers do not allow that.
  static constexpr bool kHeld = kUnits == 1 && !kTeams;
  __device__ __forceinline__ void read_weight_of(int head) {
    if (Is::kNorm == QK_NORM_NONE || (kHeld && !more.weight_head)) return;
    const int size = more.weight_dtype == QK_F32 ? 4 : 2;
    const long long at = (head < work.end ? head : work.first_head) * more.weight_head * size;
    read_weight<kSide, kBytes>(side, more, (const char*)side.weight + at, work.first, weight);
  }
  __device__ __forceinline__ Values weighted(const Values& g) const {
    Values gx;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      gx.a[i] = qk::mul(g.a[i], weight.a[i]);
      gx.b[i] = qk::mul(g.b[i], weight.b[i]);
    }
    return gx;
  }

  template <int kNorm, int kChannels>
  __device__ __forceinline__ void slope_of_head(const Values& x, const Values& gx, const Span& span,
                                                float eps, Slope& to) {
    constexpr float kShare = 1.0f / kChannels;
    if (kNorm == QK_NORM_LAYER)
      set_mean<kNorm>(group_sum(first_sums(x, gx, span), work.base, work.rank), kShare, to);
    set_slope<kNorm>(group_sum(second_sums<kNorm>(x, gx, span, to.mean), work.base, work.rank),
                     kShare, eps, to);
  }

  // What `of` gives of each head of the token; chunk by chunk, where not all are held at once.
  template <typename Part, typename Term>
  __device__ __forceinline__ Part sum_of_row(const Token& token, Term&& of) {
    Part sum = {};
    for (int chunk = 0; chunk < work.chunks; ++chunk) {
      if (work.chunks > 1) load(token, chunk);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int head = head_of(chunk, i);
        read_weight_of(head);
        const Part part = of(x[i], weighted(g[i]));
        if (head < work.end) sum = join(sum, part);
      }
    }
    return team_sum(sum, work.team_begin, work.team_warps);
  }
  __device__ __forceinline__ void slope_of_row(const Token& token, Slope& to) {
    const float share = p.base.row_share[work.side];
    auto first = [&](const Values& x, const Values& gx) { return first_sums(x, gx, span); };
    auto second = [&](const Values& x, const Values& gx) {
      return second_sums<Is::kNorm>(x, gx, span, to.mean);
    };
    if (Is::kNorm == QK_NORM_LAYER) set_mean<Is::kNorm>(sum_of_row<First>(token, first), share, to);
    set_slope<Is::kNorm>(sum_of_row<Second>(token, second), share, side.eps, to);
  }

  template <int kNorm>
  __device__ __forceinline__ static float one(float x, float g, float w, const Slope& by,
                                              float& weights, float& biases) {
    if (kNorm == QK_NORM_NONE) return g;
    const float n = qk::mul(minus_mean<kNorm>(x, by.mean), by.by);
    weights = qk::fma(g, n, weights), biases = qk::add(biases, g);
    return qk::normalise_back(qk::mul(g, w), n, by.along, by.level, by.by);
  }

  __device__ __forceinline__ void finish(const Token& token, int chunk, const Slope& row) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int head = head_of(chunk, i);
      Slope whole = row, rest = {0.0f, 0.0f, 0.0f, 0.0f};
      if constexpr (Is::kNorm != QK_NORM_NONE) {
        read_weight_of(head);
        const Values gx = weighted(g[i]);
        if constexpr (!Is::kRow)
          slope_of_head<Is::kNorm, Is::kSpec.dim>(x[i], gx, span, side.eps, whole);
        if constexpr (Is::kRest != QK_NORM_NONE)
          slope_of_head<Is::kRest, kHeadDim - Is::kSpec.dim>(x[i], gx, others, more.rest_eps, rest);
      }
      if (head >= work.end || !token.there) continue;
      Values d;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        auto channel = [&](bool in_whole, float x, float g, float w, float& sw, float& sb) {
          if (Is::kWhole || in_whole) return one<Is::kNorm>(x, g, w, whole, sw, sb);
          return one<Is::kRest>(x, g, w, rest, sw, sb);
        };
        d.a[j] = channel(span.a >> j & 1, x[i].a[j], g[i].a[j], weight.a[j], weights[i][2 * j],
                         biases[i][2 * j]);
        d.b[j] = channel(span.b >> j & 1, x[i].b[j], g[i].b[j], weight.b[j], weights[i][2 * j + 1],
                         biases[i][2 * j + 1]);
      }
      if (QK_ROPE_FIRST && turns_at(token, head)) turn_back<kSide>(angles, work.first, d);
      Row<kBytes>::template store<false>(side.y + token.dx + head * side.y_head, work.first, d);
    }
  }

  __device__ __forceinline__ static void clear(float (&sums)[kRows][2 * kCount]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int e = 0; e < 2 * kCount; ++e) sums[i][e] = 0.0f;
  }

  // The block's sums into a row of `parts`: of each head alone, or of all heads together.
  __device__ __forceinline__ void write(float (&sums)[kRows][2 * kCount], float* parts,
                                        long long columns, bool each, int chunk) {
    constexpr int kWidth = Is::kSpec.weight_dim;
    float* const shared = shared_sums();
    if (!each) {
#pragma unroll
      for (int i = 1; i < kRows; ++i)
#pragma unroll
        for (int e = 0; e < 2 * kCount; ++e) sums[0][e] = qk::add(sums[0][e], sums[i][e]);
    }
    parts += (each ? work.row : work.slot * grads.rows + work.row) * columns;
    const int held = work.team_warps * kGroups;  // heads of a team
    float* const mine = shared + (threadIdx.y * kGroups + work.group) * kHeadDim;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i && !each) continue;
      __syncthreads();
#pragma unroll
      for (int e = 0; e < 2 * kCount; ++e) {
        if (work.group >= kGroups || !is_there(work.first, e / 2)) continue;
        const int j = work.first + e / 2;
        mine[e % 2 ? norm_b<kSide>(j) : norm_a<kSide>(j)] = sums[i][e];
      }
      __syncthreads();
      const int head = work.first_head + (chunk * kRows + i) * work.step;
      const int stride = blockDim.y * 32;
      for (int at = threadIdx.y * 32 + threadIdx.x; at < (each ? held : 1) * kHeadDim;
           at += stride) {
        const int place = at / kHeadDim, c = at % kHeadDim;
        if (c >= kWidth || head + place >= work.end) continue;
        float sum = 0.0f;
        for (int team = 0; team < grads.teams; ++team) {
          const float* const row = shared + (team * held + place) * kHeadDim + c;
          float own = row[0];
          for (int h = 1; h < (each ? 1 : held); ++h) own = qk::add(own, row[h * kHeadDim]);
          sum = qk::add(sum, own);
        }
        parts[(head + place) * (each ? kWidth : 0) + c] = sum;
      }
    }
  }

  __device__ __forceinline__ void run() {
    if (Is::kNorm != QK_NORM_NONE && kHeld && !more.weight_head)
      read_weight<kSide, kBytes>(side, more, side.weight, work.first, weight);
    clear(weights), clear(biases);
    for (int chunk = 0; chunk < work.chunks; ++chunk) {
#pragma unroll 1
      for (int step = 0; step < grads.steps; ++step) {
        const Token token = locate(p, work.side, work.token + step * work.step_tokens);
        if (Is::kTurns && token.turns && !each_turns()) set_angles(token, 0);
        Slope row = {0.0f, 0.0f, 0.0f, 0.0f};
        if (work.chunks == 1) load(token, 0);
        if constexpr (Is::kRow) slope_of_row(token, row);
        if (work.chunks > 1) load(token, chunk);
        finish(token, chunk, row);
      }
      const bool last = chunk + 1 == work.chunks;
      if (grads.weight_parts && (last || grads.weight_each)) {
        write(weights, grads.weight_parts, grads.weight_columns, grads.weight_each, chunk);
        clear(weights);
      }
      if (grads.bias_parts && (last || grads.bias_each)) {
        write(biases, grads.bias_parts, grads.bias_columns, grads.bias_each, chunk);
        clear(biases);
      }
    }
  }
};

template <int kSide, int kBytes, int kRows>
__device__ __forceinline__ void serve(const Launch& p, const qk_launch_side& side,
                                      const Work& work) {
  Walk<kSide, kBytes, kRows> walk = {p, side, p.base.more[work.side], p.grads[work.side], work};
  walk.span = span_of<kSide, false>(work.first), walk.others = span_of<kSide, true>(work.first);
  walk.run();
}

template <int kBytes, int kRows>
__device__ __forceinline__ void run(const Launch& p) {
  release_next();
  Work work;
  const unsigned block = blockIdx.x;
  work.group = threadIdx.x / kLanes, work.rank = threadIdx.x % kLanes;
  work.first = work.rank * kCount, work.base = work.group * kLanes;
  work.side = block < p.grads[kK].first_block                ? kQ
              : !QK_HAS_V || block < p.grads[kV].first_block ? kK
                                                             : kV;
  const qk_launch_side& side = work.side == kV ? p.base.v : p.base.plain.side[work.side];
  const qk_backward_general_side& grads = p.grads[work.side];
  const unsigned at = block - grads.first_block;
  work.slot = at / grads.rows, work.row = at % grads.rows;
  work.team_warps = kTeams ? p.base.team_warps[work.side] : 1;
  const int team = threadIdx.y / work.team_warps;
  const bool idle = work.group >= kGroups || team >= grads.teams;
  work.team_begin = team >= grads.teams ? 0 : team * work.team_warps;
  work.step = work.team_warps * kGroups;
  work.first_head = work.slot * work.step * kRows;
  work.head = work.first_head + ((int)threadIdx.y - team * work.team_warps) * kGroups + work.group;
  work.chunks = kTeams ? (side.heads + work.step * kRows - 1) / (work.step * kRows) : 1;
  work.end = kTeams ? side.heads : min(side.heads, work.first_head + work.step * kRows);
  if (idle) work.head = work.end;
  work.token = work.row * grads.teams + min(team, grads.teams - 1);
  work.step_tokens = grads.rows * grads.teams;
  wait_for_previous();

  const int kind = work.side == kQ ? kQ : work.side == kK ? kind_of(kK) : kind_of(kV);
  if (kind == kQ) return serve<kQ, kBytes, kRows>(p, side, work);
  if constexpr (kind_of(kK) == kK)
    if (kind == kK) return serve<kK, kBytes, kRows>(p, side, work);
  if constexpr (QK_HAS_V && kind_of(kV) == kV)
    if (kind == kV) return serve<kV, kBytes, kRows>(p, side, work);
}

[[maybe_unused]] constexpr int kRegisters = kUnits == 4 ? 255 : 128;
constexpr int kHeads = kTeams ? QK_BACKWARD_TEAM_ROWS(kHeadDim, QK_ANGLE, QK_DTYPE) : 1;

}  // namespace

#define QK_KERNEL(name, bytes)                                                                \
  extern "C" __global__ void __maxnreg__(kRegisters) name(const __grid_constant__ Launch p) { \
    run<bytes, kHeads>(p);                                                                    \
  }

static_assert(QK_ROWS == kTeams, "scope");
#if QK_VECTOR_BYTES
QK_KERNEL(qkrope_vector1, QK_VECTOR_BYTES)
#endif
QK_KERNEL(qkrope_scalar, 0)
