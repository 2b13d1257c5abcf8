// launch_general.c: lays out the launch of general.cu.
#include <stdint.h>
#include <string.h>

#include "launch.h"

_Static_assert(sizeof(qk_launch_general) <= 4096, "the parameters of a kernel, on any driver");

enum { Q, K, V, SIDES };
enum { FAST_TEAM = 1 };  // where vector2 is among a variant's kernels

static int size_of(int dtype) { return dtype == QK_F32 ? 4 : 2; }

static qk_launch_side* side_of(qk_launch_general* p, int side) {
  return side == V ? &p->v : &p->plain.side[side];
}

static void fill_side(const qk_params* p, const qk_side* from, int item, int weight_dtype, int side,
                      qk_launch_general* out) {
  qk_launch_side* to = side_of(out, side);
  qk_launch_extra* more = &out->more[side];
  if (!from->heads) return;
  to->heads = from->heads;
  to->x = (const char*)from->x;
  to->y = (char*)from->y;
  to->weight = from->weight;
  to->x_head = from->x_head * item;
  to->y_head = from->y_head * item;
  to->eps = from->eps;
  to->weight_offset = from->weight_offset;
  more->bias = from->bias;
  more->scale_of = from->scale_of;
  more->weight_head = from->weight_head;
  more->bias_head = from->bias_head;
  more->scale_head = from->scale_head;
  more->scale_channel = from->scale_channel;
  more->weight_dtype = weight_dtype;
  more->bias_dtype = from->bias_dtype;
  more->scale_dtype = from->scale_dtype;
  more->scale = from->scale;
  more->rest_eps = from->rest_eps;
  more->rest_offset = from->rest_offset;
  for (int d = 0; d < p->ndim; ++d) {
    out->x_dim[side][d] = from->x_dim[d] * item;
    out->y_dim[side][d] = from->y_dim[d] * item;
    more->scale_dim[d] = from->scale_dim[d];
  }
}

void qk_fill_general(const qk_variant* v, const qk_params* p, const qk_frac* frac,
                     qk_launch_general* out) {
  const qk_side* sides[] = {&p->q, &p->k, &p->v};
  const int weights[] = {v->q_weight_dtype, v->k_weight_dtype, v->v_weight_dtype};
  const int item = size_of(v->dtype);
  memset(out, 0, sizeof *out);
  qk_fill_launch(p, item, frac, &out->plain);
  for (int i = 0; i < SIDES; ++i) fill_side(p, sides[i], item, weights[i], i, out);
  out->pos_axis = p->pos_axis * (p->pos_wide ? 8 : 4);
  out->cos_head = p->cos_head;
  out->sin_head = p->sin_head;
  out->table_heads = p->table_heads;
  out->ranged = p->rotate_from != 0 || p->rotate_to != p->last_size;
  out->last_size = (unsigned)p->last_size;
  out->rotate_from = (unsigned)p->rotate_from;
  out->rotate_to = (unsigned)p->rotate_to;
}

int qk_is_aligned_general(const qk_variant* v, qk_launch_general* p, long long more_bits) {
  const int lane = QK_LANE_UNITS(v->head_dim) * 4 * (v->pairing == QK_INTERLEAVED ? 2 : 1);
  long long rows = more_bits, eights = 0, sixteens = 0;
  for (int i = 0; i < SIDES; ++i) {
    const qk_launch_side* s = side_of(p, i);
    const qk_launch_extra* more = &p->more[i];
    if (!s->heads) continue;
    rows |= (long long)(uintptr_t)s->x | (long long)(uintptr_t)s->y | s->x_head | s->y_head;
    for (int d = 0; d < p->plain.ndim; ++d) rows |= p->x_dim[i][d] | p->y_dim[i][d];
    const struct {
      const void* data;
      long long head;
      int dtype;
    } read[] = {{s->weight, more->weight_head, more->weight_dtype},
                {more->bias, more->bias_head, more->bias_dtype}};
    for (int j = 0; j < 2; ++j) {
      if (!read[j].data) continue;
      const int size = size_of(read[j].dtype);
      const long long bits = (long long)(uintptr_t)read[j].data | read[j].head * size;
      if (lane * size == 8)
        eights |= bits;
      else
        sixteens |= bits;
    }
  }
  if (lane * size_of(v->dtype) == 8)
    eights |= rows;
  else
    sixteens |= rows;
  return !(eights & 7) && !(sixteens & 15);
}

int qk_is_row(const qk_side_variant* s) { return s->row && s->norm != QK_NORM_NONE; }

// A norm of whole rows: as many warps for a token as hold all its heads at once, or the most there
// may be. That depends on the number of heads only, so that no batch changes a sum.
static void shape_teams(const qk_kernels* kernels, const qk_checked* c, int rows, int most,
                        qk_launch_general* p, qk_grid* out) {
  const int head_dim = c->variant.head_dim, heads_a_warp = QK_GROUPS(head_dim) * rows;
  int block = 1;
  for (int i = 0; i < SIDES; ++i) {
    const int needed = (side_of(p, i)->heads + heads_a_warp - 1) / heads_a_warp;
    p->team_warps[i] = needed > most ? most : needed;
    if (needed) p->row_share[i] = 1.0f / ((float)side_of(p, i)->heads * head_dim);
    if (p->team_warps[i] > block) block = p->team_warps[i];
  }
  // Short rows: several tokens a block once every multiprocessor has some.
  if (block < 4 && p->plain.tokens > 8u * kernels->num_sms) block = 4 / block * block;
  long long blocks = 0;
  for (int i = 0; i < SIDES; ++i) {
    p->first_block[i] = blocks;
    if (!p->team_warps[i]) continue;
    const int tokens = block / p->team_warps[i];  // of a block
    p->teams[i] = tokens;
    blocks += (p->plain.tokens + (long long)tokens - 1) / tokens;
  }
  out->grid[1] = (unsigned)((blocks + INT32_MAX - 1) / INT32_MAX);
  out->grid[0] = (unsigned)((blocks + out->grid[1] - 1) / out->grid[1]);
  out->grid[2] = 1;
  out->block[0] = 32;
  out->block[1] = block;
  out->block[2] = 1;
  out->shared = 0;
}

// Whether a norm of rows may take the fast kernel, where the cubin has one: nothing beyond weights,
// in the dtype of q and k, and no more heads than its warps hold.
static int is_simple_row(const qk_kernels* kernels, const qk_checked* c,
                         const qk_launch_general* p) {
  const qk_variant* v = &c->variant;
  const int most = QK_FAST_TEAM_WARPS * QK_GROUPS(v->head_dim) *
                   QK_FAST_TEAM_ROWS(v->head_dim, size_of(v->dtype));
  if (!kernels->function[FAST_TEAM] || p->ranged || p->table_heads) return 0;
  for (int i = Q; i <= K; ++i) {
    const qk_launch_side* side = &p->plain.side[i];
    const qk_launch_extra* more = &p->more[i];
    if (!side->heads) continue;
    if (side->heads > most || more->bias || more->scale_of || more->scale != 1.0f) return 0;
    if (side->weight && more->weight_dtype != v->dtype) return 0;
  }
  return FAST_TEAM;
}

void qk_prepare_general(const qk_kernels* kernels, const qk_frac* frac, const qk_checked* c,
                        const qk_params* params, qk_launch_general* p, qk_grid* out,
                        long long* answer) {
  const qk_variant* v = &c->variant;
  const int head_dim = v->head_dim;
  int rows;
  qk_fill_general(v, params, frac, p);
  const int aligned = qk_is_aligned_general(v, p, 0);
  out->function = qk_choose_kernel(kernels, aligned, p->plain.side[Q].heads,
                                   p->plain.side[K].heads + p->v.heads, p->plain.tokens, head_dim,
                                   v->dtype == QK_F32 ? 4 : 2, &rows, answer);
  if (qk_is_row(&v->q) || qk_is_row(&v->k) || qk_is_row(&v->v)) {
    if (out->function != QK_SCALAR) out->function = is_simple_row(kernels, c, p);
    if (out->function == FAST_TEAM)
      shape_teams(kernels, c, QK_FAST_TEAM_ROWS(head_dim, size_of(v->dtype)), QK_FAST_TEAM_WARPS, p,
                  out);
    else
      shape_teams(kernels, c, QK_TEAM_ROWS(head_dim), QK_TEAM_WARPS(head_dim), p, out);
    return;
  }
  if (out->function == 1 && QK_PASSES(head_dim) == 4)
    out->function = 2, rows = 4;  // no such kernel
  p->plain.q_slots = qk_shape_side(&p->plain.side[Q], rows, head_dim);
  p->k_slots = p->plain.q_slots + qk_shape_side(&p->plain.side[K], rows, head_dim);
  p->plain.slots = p->k_slots + qk_shape_side(&p->v, rows, head_dim);
  qk_shape_grid(kernels, p->plain.tokens, p->plain.slots, rows, head_dim, out);
}
