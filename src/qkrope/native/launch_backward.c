// launch_backward.c: lays out the launches of a backward and runs them.
#include "backward.h"

#include <stdint.h>
#include <string.h>

#include "launch.h"

_Static_assert(sizeof(qk_launch_backward_plain) <= 4096, "the parameters of a kernel");

enum { BACKWARD_SHIFT = 32 };  // of a slot's key, above the device's number

long long qk_backward_key(const qk_checked* c) { return qk_slot_key(c) | 1LL << BACKWARD_SHIFT; }

// ---- the grid ----------------------------------------------------------------------------------

static struct {
  int rows, block, warps, prefetch;
} forced = {0, 0, 0, -1};

void qk_force_backward(int rows, int block, int warps, int prefetch) {
  forced.rows = rows, forced.block = block, forced.warps = warps, forced.prefetch = prefetch;
}

static int rows_of(int head_dim) { return forced.rows ? forced.rows : QK_BACKWARD_ROWS(head_dim); }

static int block_warps(void) { return forced.block ? forced.block : 4; }

static int is_tight(const qk_variant* v) {
  const int lanes = QK_LANES(v->head_dim);
  return !(lanes & (lanes - 1)) && (v->rotary_dim == v->head_dim || !v->rotary_dim) &&
         v->dtype != QK_F32 && v->q.norm == v->k.norm && v->angle != QK_ANGLE_INV_FREQ;
}

// Of the whole device.
static long long all_warps(int head_dim, int tight, int num_sms) {
  return (long long)num_sms * (forced.warps ? forced.warps : QK_BACKWARD_WARPS(head_dim, tight));
}

static long long ceil_div(long long a, long long b) { return (a + b - 1) / b; }

// Blocks of the largest side: a row each. Never more than the device holds at once, rounded up for
// each side, or than there is work for.
long long qk_cuda_partials(const qk_plan* plan, long long tokens, int num_sms) {
  const int head_dim = plan->variant.head_dim, groups = QK_GROUPS(head_dim);
  const int heads = plan->num_q_heads > plan->num_kv_heads ? plan->num_q_heads : plan->num_kv_heads;
  const long long work = ceil_div(ceil_div(tokens * heads, groups), block_warps());
  const long long room = ceil_div(all_warps(head_dim, 1, num_sms), block_warps()) + 1;
  return work < room ? work : room;
}

// One block's walk of a side: groups of lanes take units in turn, as many steps for every group.
static unsigned shape_side(qk_launch_side* side, qk_backward_side* more, unsigned tokens,
                           long long steps, int head_dim, int rows, long long most) {
  const int groups = QK_GROUPS(head_dim), warps = block_warps();
  if (!side->heads) return 0;
  more->units = qk_slots_of(side->heads, rows);
  side->passes = qk_slots_of(side->heads, more->units);  // as even as it goes
  const long long work = ceil_div((long long)tokens * more->units, groups);
  long long blocks = ceil_div(ceil_div(work, steps), warps);
  if (more->parts && blocks > most) blocks = most;
  const long long stride = blocks * warps * groups;
  more->steps = (int)ceil_div(work, blocks * warps);
  more->step_tokens = (unsigned)(stride / more->units);
  more->step_units = (int)(stride % more->units);
  return (unsigned)blocks;
}

static long long units_of(const qk_launch_side* side, int rows) {
  return qk_slots_of(side->heads, rows);
}

static void shape(qk_launch_backward_plain* p, const qk_variant* v, long long room, int rows,
                  long long most, qk_grid* out) {
  const int head_dim = v->head_dim;
  qk_launch_side* side = p->plain.side;
  const long long work = ceil_div(
      p->plain.tokens * (units_of(&side[0], rows) + units_of(&side[1], rows)), QK_GROUPS(head_dim));
  const long long steps = ceil_div(work, room);
  p->plain.q_slots =
      shape_side(&side[0], &p->more[0], p->plain.tokens, steps, head_dim, rows, most);
  out->grid[0] = p->plain.q_slots +
                 shape_side(&side[1], &p->more[1], p->plain.tokens, steps, head_dim, rows, most);
  out->grid[1] = out->grid[2] = out->block[2] = 1;
  out->block[0] = 32;
  out->block[1] = block_warps();
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

int qk_prepare_backward(const qk_kernels* kernels, const qk_frac* frac, const qk_checked* c,
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
  p->prefetch = forced.prefetch >= 0 ? forced.prefetch : 1;
  int rows = rows_of(v->head_dim);
  const int vector = rows == 4 ? 2 : rows - 1, has_layout = kernels->function[vector] != 0;
  grid->function = vector;
  if (!has_layout || !qk_is_aligned(v, &p->plain, bits_of(p))) {
    grid->function = qk_scalar_kernel(has_layout, answer);
    rows = 1;
  }
  shape(p, v, all_warps(v->head_dim, is_tight(v), kernels->num_sms), rows, grads->partials, grid);
  start_sums(&to[1]);
  add_sum(grads->q.dweight, grads->q.dweight_parts, grads->q.dweight_count, p->plain.q_slots,
          &to[1]);
  add_sum(grads->k.dweight, grads->k.dweight_parts, grads->k.dweight_count,
          grid->grid[0] - p->plain.q_slots, &to[1]);
  return to[1].grid.grid[1] ? 2 : 1;
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
    for (int j = 0; j < many && !status; ++j)
      status = qk_submit(slot->kernels->function[steps[j].grid.function], &steps[j].grid,
                         &steps[j].launch, stream);
  }
  qk_leave(pushed);
  return status;
}
