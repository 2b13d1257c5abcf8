// launch_plain.c: lays out the launch of kernel.cu.
#include <stdint.h>
#include <string.h>

#include "launch.h"

// ---- the grid ----------------------------------------------------------------------------------

// Heads of one token that a group of lanes serves: 1, 2 or 4, at most QK_PASSES.
// A small call: the fewest that leave at most 20 warps a multiprocessor. More warps would not fit
// beside those of the next call, fewer would not cover each other's latencies; and the more heads,
// the fewer times an angle is computed.
// A large one: as many as make 32 bytes a lane in flight, which is where registers still allow 40
// warps; but the most where groups cannot share a token's heads out evenly, and where rows are no
// whole cache lines, which neighbouring heads of a group then share.
int qk_rows(long long tokens, int q_heads, int k_heads, int head_dim, int size, int num_sms) {
  const int groups = QK_GROUPS(head_dim), most = QK_PASSES(head_dim);
  int rows = 1;
  for (; rows < most; rows *= 2)
    if (tokens * (qk_slots_of(q_heads, rows * groups) + qk_slots_of(k_heads, rows * groups)) <=
        20LL * num_sms)
      return rows;
  const int lanes = QK_LANES(head_dim), best = size * QK_LANE_UNITS(head_dim) <= 2 ? 2 : 1;
  const int even = q_heads % (best * groups) == 0 && k_heads % (best * groups) == 0;
  return even && (lanes & (lanes - 1)) == 0 ? best : most;
}

// Warps a block: about five blocks a multiprocessor while the grid is small; at most 8, or 4 of the
// kernels that take more registers, where blocks of 8 would leave some unused.
int qk_block_warps(long long warps, int head_dim, int rows, int num_sms) {
  const int most = rows == 4 || QK_LANE_UNITS(head_dim) > 1 ? 4 : 8;
  long long block = (warps + 5LL * num_sms - 1) / (5LL * num_sms);
  return block > most ? most : block < 1 ? 1 : (int)block;
}

static long long mix(long long bits, const qk_launch_side* s, const qk_launch* p, int side) {
  if (!s->heads) return bits;
  bits |= (long long)(uintptr_t)s->x | (long long)(uintptr_t)s->y;
  bits |= (long long)(uintptr_t)s->weight | s->x_head | s->y_head;
  for (int d = 0; d < p->ndim; ++d) bits |= p->x_dim[side][d] | p->y_dim[side][d];
  return bits;
}

int qk_is_aligned(const qk_variant* v, const qk_launch* p, long long more) {
  int eights = v->pairing == QK_HALF && v->dtype != QK_F32 && QK_LANE_UNITS(v->head_dim) == 1;
  long long bits = mix(mix(more, &p->side[0], p, 0), &p->side[1], p, 1);
  return !(bits & (eights ? 7 : 15));
}

static void launch_side(const qk_params* p, const qk_side* from, int item, int side,
                        qk_launch* out) {
  qk_launch_side* to = &out->side[side];
  to->heads = from->heads;
  if (!from->heads) return;
  to->x = (const char*)from->x;
  to->y = (char*)from->y;
  to->weight = from->weight;
  to->x_head = from->x_head * item;
  to->y_head = from->y_head * item;
  to->eps = from->eps;
  to->weight_offset = from->weight_offset;
  for (int d = 0; d < p->ndim; ++d) {
    out->x_dim[side][d] = from->x_dim[d] * item;
    out->y_dim[side][d] = from->y_dim[d] * item;
  }
  to->x_token = out->x_dim[side][0];
  to->y_token = out->y_dim[side][0];
}

void qk_fill_launch(const qk_params* p, int item, const qk_frac* frac, qk_launch* out) {
  memset(out, 0, sizeof *out);
  launch_side(p, &p->q, item, 0, out);
  launch_side(p, &p->k, item, 1, out);
  out->pos = (const char*)p->pos;
  out->frac = frac;
  out->tokens = (unsigned)p->tokens;
  out->attention_factor = p->attention_factor;
  out->pos_wide = p->pos_wide;
  out->early_weights = p->early_weights;
  out->ndim = p->ndim;
  for (int d = 0; d < p->ndim; ++d) {
    out->size[d] = (unsigned)p->size[d];
    out->pos_dim[d] = p->pos_dim[d] * (p->pos_wide ? 8 : 4);
    out->cos_dim[d] = p->cos_dim[d];
    out->sin_dim[d] = p->sin_dim[d];
  }
  out->pos_token = out->pos_dim[0];
  out->inv_freq = p->inv_freq;
  out->inv_freq_step = p->inv_freq_step;
  out->inv_freq_dtype = p->inv_freq_dtype;
  out->table_dtype = p->table_dtype;
  out->table_full = p->table_full;
  out->table_rows = p->table_rows;
  out->cos = (const char*)p->cos;
  out->sin = (const char*)p->sin;
  out->cos_step = p->cos_step, out->sin_step = p->sin_step;
  out->cos_row = p->cos_row, out->sin_row = p->sin_row;
}

// For the bench that justifies the rules above: heads a group, warps a block; 0 is the rule.
static int forced_rows, forced_warps, epoch;

void qk_force_grid(int rows, int warps) { forced_rows = rows, forced_warps = warps, ++epoch; }
int qk_grid_epoch(void) { return epoch; }

int qk_choose_kernel(const qk_kernels* kernels, int aligned, int q_heads, int k_heads,
                     long long tokens, int head_dim, int size, int* rows, long long* answer) {
  void* const* functions = kernels->function;
  if (functions[0] && aligned) {
    *rows = forced_rows ? forced_rows
                        : qk_rows(tokens, q_heads, k_heads, head_dim, size, kernels->num_sms);
    return *rows == 4 ? 2 : *rows - 1;
  }
  *rows = QK_PASSES(head_dim);
  return qk_scalar_kernel(functions[0] != 0, answer);
}

int qk_scalar_kernel(int has_layout, long long* answer) {
  static int said[2];  // a slow path announces itself, once
  int why = has_layout ? 0 : 1;
  if (!said[why]) *answer = -1 - why;
  said[why] = 1;
  return QK_SCALAR;
}

int qk_shape_side(qk_launch_side* side, int rows, int head_dim) {
  // Heads that a warp serves at a time.
  const int a_pass = QK_ON_TOKENS(head_dim, rows) ? 1 : QK_GROUPS(head_dim);
  const int needed = qk_slots_of(side->heads, rows * a_pass);
  if (needed) side->passes = qk_slots_of(side->heads, needed * a_pass);  // as even as it goes
  return needed;
}

void qk_shape_grid(const qk_kernels* kernels, unsigned tokens, int slots, int rows, int head_dim,
                   qk_grid* out) {
  const unsigned tokens_a_warp = QK_ON_TOKENS(head_dim, rows) ? QK_GROUPS(head_dim) : 1;
  const unsigned warps = (tokens + tokens_a_warp - 1) / tokens_a_warp;
  unsigned block = qk_block_warps((long long)warps * slots, head_dim, rows, kernels->num_sms);
  if (forced_warps) block = forced_warps;
  const unsigned blocks = (warps + block - 1) / block;
  out->grid[0] = slots;
  out->grid[2] = (blocks + 65534) / 65535;
  out->grid[1] = (blocks + out->grid[2] - 1) / out->grid[2];
  out->block[0] = 32;
  out->block[1] = block;
  out->block[2] = 1;
}

void qk_prepare(const qk_kernels* kernels, const qk_frac* frac, const qk_checked* c,
                const qk_params* params, qk_launch* p, qk_grid* out, long long* answer) {
  const int head_dim = c->variant.head_dim, size = c->variant.dtype == QK_F32 ? 4 : 2;
  int rows;
  qk_fill_launch(params, size, frac, p);
  const int aligned = kernels->function[0] && qk_is_aligned(&c->variant, p, 0);
  out->function = qk_choose_kernel(kernels, aligned, p->side[0].heads, p->side[1].heads, p->tokens,
                                   head_dim, size, &rows, answer);
  p->q_slots = qk_shape_side(&p->side[0], rows, head_dim);
  const int slots = p->q_slots + qk_shape_side(&p->side[1], rows, head_dim);
  qk_shape_grid(kernels, p->tokens, slots, rows, head_dim, out);
}
