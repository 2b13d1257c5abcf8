// launch_plain.c: lays out the launch of kernel.cu.
#include <stdint.h>
#include <string.h>

#include "launch.h"

// ---- the grid ----------------------------------------------------------------------------------

// Heads of one token that a group of lanes serves: 1, 2 or 4, at most QK_PASSES.
// A small call: one while that leaves at most 8 warps a multiprocessor, then the fewest that leave
// at most 20. More warps would not fit beside those of the next call, fewer would not cover each
// other's latencies; and the more heads, the fewer times an angle is computed.
// A large one: as many as make 32 bytes a lane in flight, which is where registers still allow 40
// warps; but the most where groups cannot share a token's heads out evenly, and where rows are no
// whole cache lines, which neighbouring heads of a group then share.
int qk_rows(long long tokens, int q_heads, int k_heads, int head_dim, int size, int num_sms) {
  const int groups = QK_GROUPS(head_dim), most = QK_PASSES(head_dim);
  for (int rows = 1; rows < most; rows *= 2)
    if (tokens * (qk_slots_of(q_heads, rows * groups) + qk_slots_of(k_heads, rows * groups)) <=
        (rows == 1 && most > 2 ? 8LL : QK_BESIDE) * num_sms)
      return rows;
  const int lanes = QK_LANES(head_dim), best = size * QK_LANE_UNITS(head_dim) <= 2 ? 2 : 1;
  const int even = q_heads % (best * groups) == 0 && k_heads % (best * groups) == 0;
  return even && (lanes & (lanes - 1)) == 0 ? best : most;
}

// Warps a block, the slots of so many tokens shared out: what leaves the busiest multiprocessor the
// fewest warps, and of several such the most; at most 8, or 4 of the kernels that take more
// registers, where blocks of 8 would leave some unused.
int qk_block_warps(int slots, long long walks, int head_dim, int rows, int num_sms) {
  const int most = rows == 4 || QK_LANE_UNITS(head_dim) > 1 ? 4 : 8;
  const int even = qk_slots_of(slots, qk_slots_of(slots, most));
  if (slots * walks > (long long)QK_BESIDE * num_sms) return even;  // many blocks are even enough
  int best = even;
  long long least = INT64_MAX;
  for (int most_here = most; most_here; --most_here) {
    const int blocks = qk_slots_of(slots, most_here), warps = qk_slots_of(slots, blocks);
    long long busiest = (blocks * walks + num_sms - 1) / num_sms * warps;
    if (busiest < 3) busiest = 3;  // fewer gain nothing
    if (busiest < least) least = busiest, best = warps;
  }
  return best;
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

// Shared memory that a block asks for and does not use: so much that this call and the next just
// fit on a multiprocessor. Launched one behind the other, small calls would else pile up there,
// five deep, and the blocks of the newest go where there is room: to a few of the multiprocessors.
static unsigned shared_of(const qk_kernels* kernels, long long blocks, unsigned warps) {
  const long long share = (blocks + kernels->num_sms - 1) / kernels->num_sms;
  if (share * warps > QK_BESIDE) return 0;
  const long long bytes = kernels->shared_bytes / (2 * share) - kernels->reserved_bytes;
  return bytes <= 0 ? 0 : (unsigned)(bytes & ~127LL);
}

void qk_shape_grid(const qk_kernels* kernels, unsigned tokens, int slots, int rows, int head_dim,
                   qk_grid* out) {
  const unsigned tokens_a_warp = QK_ON_TOKENS(head_dim, rows) ? QK_GROUPS(head_dim) : 1;
  const unsigned walks = (tokens + tokens_a_warp - 1) / tokens_a_warp;
  int block = qk_block_warps(slots, walks, head_dim, rows, kernels->num_sms);
  if (forced_warps) block = forced_warps;
  out->grid[0] = qk_slots_of(slots, block);
  out->grid[2] = (walks + 65534) / 65535;
  out->grid[1] = (walks + out->grid[2] - 1) / out->grid[2];
  out->block[0] = 32;
  out->block[1] = qk_slots_of(slots, out->grid[0]);  // as even as it goes
  out->block[2] = 1;
  out->shared = shared_of(kernels, (long long)out->grid[0] * walks, out->block[1]);
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
  p->slots = p->q_slots + qk_shape_side(&p->side[1], rows, head_dim);
  qk_shape_grid(kernels, p->tokens, p->slots, rows, head_dim, out);
}
