// launch_backward.c: lays out the launches of a backward and runs them.
#include "backward.h"

#include <stdint.h>
#include <string.h>

#include "launch.h"

_Static_assert(sizeof(qk_launch_backward_general) <= 4096, "the parameters of a kernel");

enum { BACKWARD_SHIFT = 32 };  // of a slot's key, above the device's number

long long qk_backward_key(const qk_checked* c) { return qk_slot_key(c) | 1LL << BACKWARD_SHIFT; }

// ---- the grid ----------------------------------------------------------------------------------

static struct {
  int block, warps, prefetch;
} forced = {0, 0, -1};

void qk_force_backward(int block, int warps, int prefetch) {
  forced.block = block, forced.warps = warps, forced.prefetch = prefetch;
}

enum { FEW_WARPS = QK_GENERAL_SUM_WARPS };  // of a block; a team may have more
static int block_warps(int sums) {
  return forced.block ? forced.block : sums ? QK_SUM_WARPS : FEW_WARPS;
}

// What scans found (docs/kernel-log.md). A large call is shared out as blocks end, not beforehand,
// as if some multiprocessors reached memory faster than others. With sums a block's end costs a row
// of them: rounds of blocks are fewer, and blocks have eight warps, two of them at once. A call is
// large by the steps of a warp, with sums by those times the bytes of an element.
enum { SUMS_HELD = 16, SUMS_ROUNDS = 4, SUMS_LARGE = 80, ROUNDS = 8, LARGE = 8 };

static int is_tight(const qk_variant* v) {
  const int lanes = QK_LANES(v->head_dim);
  return !(lanes & (lanes - 1)) && (v->rotary_dim == v->head_dim || !v->rotary_dim) &&
         v->dtype != QK_F32 && v->q.norm == v->k.norm && v->angle != QK_ANGLE_INV_FREQ;
}

static long long ceil_div(long long a, long long b) { return (a + b - 1) / b; }

// Blocks of so many warps a multiprocessor.
static long long held_blocks(int num_sms, int warps, int block) {
  if (forced.warps) warps = forced.warps;
  return (long long)num_sms * (warps > block ? warps / block : 1);
}

// Rows of partial sums: enough for a side's blocks, each of which writes one. They are never more
// than a large call has blocks, rounded up for each slot of heads, or than there is work for.
long long qk_cuda_partials(const qk_plan* plan, long long tokens, int num_sms) {
  const int head_dim = plan->variant.head_dim, groups = QK_GROUPS(head_dim);
  const int heads = plan->num_q_heads > plan->num_kv_heads ? plan->num_q_heads : plan->num_kv_heads;
  const long long slots = ceil_div(heads, groups);
  const long long work = ceil_div(tokens, FEW_WARPS) * slots;
  const long long held = held_blocks(num_sms, SUMS_ROUNDS * SUMS_HELD, block_warps(1));
  const long long room = held > slots ? held : slots;
  return work < room ? work : room;
}

// The boundary knows no number of multiprocessors, and so only that there is a workspace.
static int check_room(long long most, long long least) {
  if (most >= least) return 0;
  return qk_raise("ValueError", "workspace: expected room for %lld rows of sums or more, got %lld",
                  least, most);
}

// Blocks of a side whose groups of lanes take units in turn, `steps` or fewer each.
static long long blocks_of(const qk_launch_side* side, long long tokens, long long steps,
                           int head_dim, int rows, int block) {
  const long long units = tokens * qk_slots_of(side->heads, rows);
  return ceil_div(units, steps * block * QK_GROUPS(head_dim));
}

static void shape_side(qk_launch_side* side, qk_backward_side* more, long long tokens,
                       long long blocks, int head_dim, int rows, int block) {
  if (!side->heads) return;
  const long long stride = blocks * block * QK_GROUPS(head_dim);
  more->units = qk_slots_of(side->heads, rows);
  side->passes = qk_slots_of(side->heads, more->units);  // as even as it goes
  more->steps = (int)ceil_div(tokens * more->units, stride);
  more->step_tokens = (unsigned)(stride / more->units);
  more->step_units = (int)(stride % more->units);
}

// As few steps as that number of blocks allows for both sides, with a row of sums for each.
static void shape(qk_launch_backward_plain* p, int head_dim, long long wanted, int rows, int block,
                  long long most, qk_grid* out) {
  qk_launch_side* side = p->plain.side;
  const long long tokens = p->plain.tokens;
  long long q, k, steps = 0;
  do {
    ++steps;
    q = blocks_of(&side[0], tokens, steps, head_dim, rows, block);
    k = blocks_of(&side[1], tokens, steps, head_dim, rows, block);
    // Far too many: nearly there at once.
    if (q + k > 2 * wanted) steps = (q + k) / wanted * steps - 1;
  } while (q + k > wanted && (q > 1 || k > 1));
  if (p->more[0].parts && q > most) q = most;
  if (p->more[1].parts && k > most) k = most;
  shape_side(&side[0], &p->more[0], tokens, q, head_dim, rows, block);
  shape_side(&side[1], &p->more[1], tokens, k, head_dim, rows, block);
  p->plain.q_slots = (int)q;
  out->grid[0] = (unsigned)(q + k);
  out->grid[1] = out->grid[2] = out->block[2] = 1;
  out->shared = 0;
  out->block[0] = 32;
  out->block[1] = block;
}

// ---- the launches -------------------------------------------------------------------------------

static void fill_side(const qk_side_grads* from, int item, int ndim, qk_backward_side* to,
                      long long* dy_dim) {
  to->dy = (const char*)from->dy;
  to->dy_head = from->dy_head * item;
  to->parts = from->dweight ? from->dweight_parts : 0;
  for (int d = 0; d < ndim; ++d) dy_dim[d] = from->dy_dim[d] * item;
  to->dy_token = dy_dim[0];
}

static long long bits_of(const qk_launch_backward_plain* p) {
  long long bits = 0;
  for (int i = 0; i < 2; ++i) {
    if (!p->plain.side[i].heads) continue;
    bits |= (long long)(uintptr_t)p->more[i].dy | p->more[i].dy_head;
    for (int d = 0; d < p->plain.ndim; ++d) bits |= p->dy_dim[i][d];
  }
  return bits;
}

static void add_sum(float* to, const float* parts, long long columns, unsigned rows,
                    qk_backward_step* step) {
  if (!to) return;
  const unsigned blocks = (unsigned)ceil_div(columns, QK_SUM_COLUMNS);
  qk_sum* sum = &step->launch.sums.sum[step->grid.grid[1]++];
  sum->parts = parts;
  sum->to = to;
  sum->columns = columns;
  sum->rows = (int)rows;
  if (blocks > step->grid.grid[0]) step->grid.grid[0] = blocks;
}

static void start_sums(qk_backward_step* step) {
  memset(step, 0, sizeof *step);
  step->grid.function = QK_SUMS;
  step->grid.grid[2] = step->grid.block[2] = 1;
  step->grid.block[0] = 32;
  step->grid.block[1] = QK_SUM_THREADS / 32;
}

static long long wanted_blocks(const qk_launch_backward_plain* p, const qk_variant* v, int sums,
                               int rows, int num_sms) {
  const qk_launch_side* side = p->plain.side;
  int warps = QK_BACKWARD_WARPS(v->head_dim, is_tight(v));
  const long long units = qk_slots_of(side[0].heads, rows) + qk_slots_of(side[1].heads, rows);
  const long long work = p->plain.tokens * units / QK_GROUPS(v->head_dim);  // of a warp
  if (sums && warps > SUMS_HELD) warps = SUMS_HELD;
  const int item = v->dtype == QK_F32 ? 4 : 2;
  if (sums ? work * item > (long long)SUMS_LARGE * warps * num_sms
           : work > (long long)LARGE * warps * num_sms)
    warps *= sums ? SUMS_ROUNDS : ROUNDS;
  return held_blocks(num_sms, warps, block_warps(sums));
}

static int prepare_plain(const qk_kernels* kernels, const qk_frac* frac, const qk_checked* c,
                         int part, qk_backward_step* to, long long* answer) {
  const qk_variant* v = &c->variant;
  const qk_grads* grads = &c->grads[part];
  const int item = v->dtype == QK_F32 ? 4 : 2;
  qk_launch_backward_plain* p = &to[0].launch.plain;
  qk_grid* grid = &to[0].grid;
  memset(p, 0, sizeof *p);
  qk_fill_launch(&c->part[part], item, frac, &p->plain);
  fill_side(&grads->q, item, p->plain.ndim, &p->more[0], p->dy_dim[0]);
  fill_side(&grads->k, item, p->plain.ndim, &p->more[1], p->dy_dim[1]);
  p->prefetch = forced.prefetch >= 0 ? forced.prefetch : 3;
  int rows = QK_BACKWARD_ROWS(v->head_dim);
  const int vector = rows - 1, has_layout = kernels->function[vector] != 0;
  grid->function = vector;
  if (!has_layout || !qk_is_aligned(v, &p->plain, bits_of(p))) {
    grid->function = qk_scalar_kernel(has_layout, answer);
    rows = 1;
  }
  const int sums = p->more[0].parts || p->more[1].parts;
  if (sums && check_room(grads->partials, 1)) return -1;
  shape(p, v->head_dim, wanted_blocks(p, v, sums, rows, kernels->num_sms), rows, block_warps(sums),
        grads->partials, grid);
  start_sums(&to[1]);
  add_sum(grads->q.dweight, grads->q.dweight_parts, grads->q.dweight_count, p->plain.q_slots,
          &to[1]);
  add_sum(grads->k.dweight, grads->k.dweight_parts, grads->k.dweight_count,
          grid->grid[0] - p->plain.q_slots, &to[1]);
  return to[1].grid.grid[1] ? 2 : 1;
}

// ---- the general kernel -------------------------------------------------------------------------

enum { SIDES = 3 };

static void fill_general(const qk_side_grads* from, int item, int ndim,
                         qk_backward_general_side* to, long long* dy_dim) {
  to->dy = (const char*)from->dy;
  to->dy_head = from->dy_head * item;
  to->weight_parts = from->dweight ? from->dweight_parts : 0;
  to->bias_parts = from->dbias ? from->dbias_parts : 0;
  to->weight_columns = from->dweight_count;
  to->bias_columns = from->dbias_count;
  to->weight_each = from->dweight_head != 0;
  to->bias_each = from->dbias_head != 0;
  for (int d = 0; d < ndim; ++d) dy_dim[d] = from->dy_dim[d] * item;
}

// Heads of a side lie in slots, which blocks have one each of; a norm of whole rows has a single
// one, and a team of warps for it, whose size depends on the heads alone.
static int shape_general(const qk_kernels* kernels, const qk_variant* v, long long most,
                         const int* heads, qk_launch_backward_general* p, qk_grid* out) {
  const int head_dim = v->head_dim, groups = QK_GROUPS(head_dim);
  const int teams = qk_is_row(&v->q) || qk_is_row(&v->k) || qk_is_row(&v->v);
  const int rows = teams ? QK_BACKWARD_TEAM_ROWS(head_dim, v->angle, v->dtype) : 1;
  const unsigned tokens = p->base.plain.tokens;
  int slots[SIDES], block = 1;
  for (int i = 0; i < SIDES; ++i) {
    const int needed = qk_slots_of(heads[i], groups * rows);  // warps for all heads at once
    const int chunks = qk_slots_of(needed, QK_TEAM_WARPS(head_dim));
    p->base.team_warps[i] = teams && needed ? qk_slots_of(needed, chunks) : needed ? 1 : 0;
    if (needed) p->base.row_share[i] = 1.0f / ((float)heads[i] * head_dim);
    slots[i] = teams && needed ? 1 : needed;
    if (p->base.team_warps[i] > block) block = p->base.team_warps[i];
  }
  if (block < FEW_WARPS) block = FEW_WARPS / block * block;
  const long long held = held_blocks(kernels->num_sms, QK_BACKWARD_TEAM_WARPS(head_dim), block);
  long long blocks[SIDES], all, steps = 0;
  do {
    all = 0, ++steps;
    for (int i = 0; i < SIDES; ++i) {
      p->grads[i].teams = slots[i] ? block / p->base.team_warps[i] : 1;
      blocks[i] = slots[i] ? ceil_div(tokens, steps * p->grads[i].teams) : 0;
      all += blocks[i] * slots[i];
    }
    if (all > 2 * held) steps = all / held * steps - 1;
  } while (all > held && (blocks[0] > 1 || blocks[1] > 1 || blocks[2] > 1));
  out->grid[0] = 0;
  for (int i = 0; i < SIDES; ++i) {
    qk_backward_general_side* side = &p->grads[i];
    side->first_block = out->grid[0];
    side->rows = 1;
    if (!slots[i]) continue;
    if (side->weight_parts || side->bias_parts) {
      if (check_room(most, slots[i])) return -1;
      if (blocks[i] > most / slots[i]) blocks[i] = most / slots[i];
    }
    side->rows = (unsigned)blocks[i];
    side->steps = (int)ceil_div(tokens, blocks[i] * side->teams);
    out->grid[0] += (unsigned)blocks[i] * slots[i];
  }
  out->grid[1] = out->grid[2] = out->block[2] = 1;
  out->shared = 0;
  out->block[0] = 32;
  out->block[1] = block;
  return 0;
}

static int prepare_general(const qk_kernels* kernels, const qk_frac* frac, const qk_checked* c,
                           int part, qk_backward_step* to, long long* answer) {
  const qk_variant* v = &c->variant;
  const qk_grads* grads = &c->grads[part];
  const qk_side_grads* sides[SIDES] = {&grads->q, &grads->k, &grads->v};
  const int item = v->dtype == QK_F32 ? 4 : 2;
  qk_launch_backward_general* p = &to[0].launch.general;
  qk_launch* plain = &p->base.plain;
  memset(p, 0, sizeof *p);
  qk_fill_general(v, &c->part[part], frac, &p->base);
  const int heads[SIDES] = {plain->side[0].heads, plain->side[1].heads, p->base.v.heads};
  long long bits = 0;
  for (int i = 0; i < SIDES; ++i) {
    if (!heads[i]) continue;
    fill_general(sides[i], item, plain->ndim, &p->grads[i], p->dy_dim[i]);
    bits |= (long long)(uintptr_t)p->grads[i].dy | p->grads[i].dy_head;
    for (int d = 0; d < plain->ndim; ++d) bits |= p->dy_dim[i][d];
  }
  const int has_layout = kernels->function[0] != 0;
  const int aligned = has_layout && qk_is_aligned_general(v, &p->base, bits);
  to[0].grid.function = aligned ? 0 : qk_scalar_kernel(has_layout, answer);
  if (shape_general(kernels, v, grads->partials, heads, p, &to[0].grid)) return -1;
  start_sums(&to[1]);
  for (int i = 0; i < SIDES; ++i) {
    const qk_backward_general_side* side = &p->grads[i];
    const unsigned next = i + 1 < SIDES ? p->grads[i + 1].first_block : to[0].grid.grid[0];
    const unsigned blocks = next - side->first_block;
    if (!heads[i]) continue;
    add_sum(sides[i]->dweight, sides[i]->dweight_parts, sides[i]->dweight_count,
            side->weight_each ? side->rows : blocks, &to[1]);
    add_sum(sides[i]->dbias, sides[i]->dbias_parts, sides[i]->dbias_count,
            side->bias_each ? side->rows : blocks, &to[1]);
  }
  return to[1].grid.grid[1] ? 2 : 1;
}

int qk_prepare_backward(const qk_kernels* kernels, const qk_frac* frac, const qk_checked* c,
                        int part, qk_backward_step* to, long long* answer) {
  return c->general ? prepare_general(kernels, frac, c, part, to, answer)
                    : prepare_plain(kernels, frac, c, part, to, answer);
}

int qk_launch_backward(const qk_plan* plan, const qk_checked* c, void* stream, long long* answer) {
  const long long key = qk_backward_key(c);
  const qk_slot* slot = qk_find_slot(plan, c, key);
  if (!slot) {
    *answer = key;
    return 0;
  }
  for (int i = 0; i < c->num_parts; ++i)
    if (c->part[i].tokens > INT32_MAX)
      return qk_raise("ValueError", "q, k: got %lld tokens, expected at most 2^31 - 1",
                      c->part[i].tokens);
  int pushed, status = 0;
  if (qk_enter(c->device_id, &pushed)) return -1;
  for (int i = 0; i < c->num_parts && !status; ++i) {
    qk_backward_step steps[QK_BACKWARD_STEPS];
    if (!c->part[i].tokens) continue;
    const int many = qk_prepare_backward(slot->kernels, slot->frac, c, i, steps, answer);
    if (many < 0) status = -1;
    for (int j = 0; j < many && !status; ++j)
      status = qk_submit(slot->kernels->function[steps[j].grid.function], &steps[j].grid,
                         &steps[j].launch, stream);
  }
  qk_leave(pushed);
  return status;
}
