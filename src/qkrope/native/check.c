// check.c: the boundary. Every argument is checked here and in the files beside, once, for both
// backends, before anything is written; what passes becomes the qk_params that the kernels read.
#include <string.h>

#include "check.h"

// Joins neighbouring leading dimensions that every operand walks as one, and drops those of size 1.
static int coalesce(qk_params* p, int lead, const long long* size, long long* strides[], int n) {
  int kept = 0;
  p->tokens = 1;
  for (int d = 0; d < lead; ++d) {
    p->tokens *= size[d];
    if (size[d] == 1) continue;
    int joins = kept > 0;
    for (int i = 0; joins && i < n; ++i) joins = strides[i][kept - 1] == strides[i][d] * size[d];
    if (!joins && kept == QK_MAX_DIMS)
      return qk_raise("ValueError", "q, k: more than %d leading dimensions that do not coalesce",
                      QK_MAX_DIMS);
    if (!joins) ++kept;
    p->size[kept - 1] = joins ? p->size[kept - 1] * size[d] : size[d];
    for (int i = 0; i < n; ++i) strides[i][kept - 1] = strides[i][d];
  }
  if (!kept) {
    p->size[0] = 1;
    for (int i = 0; i < n; ++i) strides[i][0] = 0;
    kept = 1;
  }
  p->ndim = kept;
  return 0;
}

// One part: the sides that walk the same tokens.
static int make_part(const qk_call* c, const operands* o, const int* sides, qk_checked* out) {
  enum { X, Y, SCALE, POS = 3 * SIDES, COS, SIN, DY, WALKS = DY + SIDES };
  const int dtype = out->variant.dtype;
  const int walked = c->backward ? WALKS : DY;
  qk_grads* grads = &out->grads[out->num_parts];
  qk_params* p = &out->part[out->num_parts++];
  qk_side* to[] = {&p->q, &p->k, &p->v};
  qk_side_grads* grads_to[] = {&grads->q, &grads->k, &grads->v};
  const qk_view* lead = &o->in[sides[Q] ? Q : sides[K] ? K : V];
  long long walks[WALKS][QK_RAW_DIMS];
  for (int d = 0; d < lead->ndim - 2; ++d)
    for (int i = 0; i < walked; ++i) walks[i][d] = 0;
  memset(p, 0, sizeof *p);
  if (c->backward) memset(grads, 0, sizeof *grads);
  p->general = out->variant.general;
  for (int i = 0; i < SIDES; ++i) {
    if (!sides[i]) continue;
    const qk_view *x = &o->in[i], *y = &o->out[i];
    if (qk_check_side(c, o, i, &out->variant, to[i]) ||
        qk_check_scale(c, o, i, dtype, to[i], walks[3 * i + SCALE]))
      return -1;
    if (c->backward) {
      if (qk_check_gradient(c, o, i, dtype, grads_to[i], walks[DY + i])) return -1;
      p->general |= grads_to[i]->dweight_head || grads_to[i]->dbias_head;
    }
    for (int d = 0; d < x->ndim - 2; ++d)
      walks[3 * i + X][d] = x->stride[d], walks[3 * i + Y][d] = y->stride[d];
    if (i != V)
      p->general |= to[i]->bias || to[i]->weight_head || to[i]->scale_of || to[i]->scale != 1.0f;
  }
  if (qk_check_angles(c, o, sides, lead, dtype, p, walks[POS], walks[COS], walks[SIN])) return -1;
  long long* strides[WALKS];
  for (int i = 0; i < walked; ++i) strides[i] = walks[i];
  if (coalesce(p, lead->ndim - 2, lead->size, strides, walked)) return -1;
  long long* dims[] = {p->q.x_dim,      p->q.y_dim,      p->q.scale_dim, p->k.x_dim,
                       p->k.y_dim,      p->k.scale_dim,  p->v.x_dim,     p->v.y_dim,
                       p->v.scale_dim,  p->pos_dim,      p->cos_dim,     p->sin_dim,
                       grads->q.dy_dim, grads->k.dy_dim, grads->v.dy_dim};
  for (int d = 0; d < p->ndim; ++d)
    for (int i = 0; i < walked; ++i) dims[i][d] = strides[i][d];
  return 0;
}

static int same_leading(const qk_view* a, const qk_view* b) {
  return a->ndim == b->ndim && !memcmp(a->size, b->size, (a->ndim - 2) * sizeof *a->size);
}

// Whether the plain CUDA kernel does not run it. It reads a caller's frequencies as they are.
static int is_general(const qk_plan* plan, const qk_checked* out) {
  const qk_variant* v = &out->variant;
  int general = plan->has_v || (v->reverse && v->angle == QK_ANGLE_INV_FREQ);
  for (int i = 0; i < out->num_parts; ++i) general |= out->part[i].general;
  return general;
}

int qk_check(const qk_call* c, qk_checked* out) {
  const qk_plan* plan = c->plan;
  operands o;
  memset(&o.has, 0, sizeof o.has);
  out->num_parts = 0;  // each part is cleared when it is made: most calls have one
  out->variant = plan->variant;
  qk_variant* v = &out->variant;
  if (qk_check_sides(c, &o, &v->dtype)) return -1;
  v->q_weight_dtype = v->k_weight_dtype = v->v_weight_dtype = -1;
  if (c->backward) {
    v->q.round_norm = v->k.round_norm = v->v.round_norm = QK_ROUND_ONCE;
    v->q.round_turn = v->k.round_turn = v->v.round_turn = QK_TURN_ONCE;
  }
  const int rotates = v->rotary_dim > 0, has_q = o.has[Q], has_k = o.has[K];
  v->angle = !rotates                                 ? QK_ANGLE_NONE
             : c->cos || c->k_cos || c->cos_sin_cache ? QK_ANGLE_TABLE
             : c->inv_freq                            ? QK_ANGLE_INV_FREQ
                                                      : QK_ANGLE_PHASE;
  // The caller's sine is of the angle, which is to be turned back.
  if (v->reverse && v->angle == QK_ANGLE_TABLE) v->general = 1;
  out->device_type = o.device_type;
  out->device_id = o.device_id;

  // q and k walk the tokens together unless each has positions or tables of its own.
  const int apart = c->k_positions || c->k_cos;
  const int same = has_q && has_k && same_leading(&o.in[Q], &o.in[K]);
  char q_text[128], k_text[128];
  if (has_q && has_k && !same && !apart && rotates)
    return qk_raise("ValueError",
                    "k: expected the leading dimensions of q, %s, got %s; give "
                    "positions=(q_positions, k_positions) where the lengths differ",
                    qk_shape_text(o.in[Q].size, o.in[Q].ndim - 2, q_text, sizeof q_text),
                    qk_shape_text(o.in[K].size, o.in[K].ndim - 2, k_text, sizeof k_text));
  int parts[SIDES][SIDES] = {{has_q, same && !apart}}, n = has_q;
  if (has_k && !parts[0][K]) parts[n++][K] = 1;
  if (o.has[V]) {
    int at = n;
    for (int i = 0; i < n; ++i)
      if (same_leading(&o.in[V], &o.in[parts[i][K] ? K : Q])) at = i;
    parts[at][V] = 1;
    n += at == n;
  }
  for (int i = 0; i < n; ++i)
    if (make_part(c, &o, parts[i], out)) return -1;
  if (qk_check_memory(c, &o)) return -1;
  if (c->backward && qk_check_workspace(c, &o, out)) return -1;
  out->general = is_general(plan, out);
  return 0;
}
