// check.c: the boundary. Every argument is checked here, once, for both backends, before anything
// is written; what passes becomes the qk_params that the kernels read.
#include <stdint.h>
#include <string.h>

#include "check.h"

// ---- q, k and their outputs -------------------------------------------------------------------

static int heads_view(const char* name, const DLTensor* t, int heads, int head_dim, qk_view* v) {
  if (qk_view_of(name, t, v)) return -1;
  char got[128];
  if (v->ndim < 2 || v->size[v->ndim - 1] != head_dim || v->size[v->ndim - 2] != heads)
    return qk_raise("ValueError", "%s: expected shape [..., %d heads, %d head_dim], got %s", name,
                    heads, head_dim, qk_shape_text(v->size, v->ndim, got, sizeof got));
  if (v->stride[v->ndim - 1] != 1)
    return qk_raise("ValueError", "%s: expected stride 1 in the last dimension, got %lld", name,
                    v->stride[v->ndim - 1]);
  return 0;
}

// The q or k columns of packed [..., (nq+nk+nv)*head_dim] as [..., heads, head_dim].
static void packed_side(const qk_view* packed, const char* name, int first_head, int heads,
                        int head_dim, qk_view* v) {
  *v = *packed;
  v->name = name;
  v->data += (long long)first_head * head_dim * v->item;
  v->size[v->ndim - 1] = heads;
  v->stride[v->ndim - 1] = head_dim;
  v->size[v->ndim] = head_dim;
  v->stride[v->ndim++] = 1;
}

static int packed_views(const qk_plan* plan, const DLTensor* qkv, operands* o) {
  int head_dim = plan->variant.head_dim, nq = plan->num_q_heads, nk = plan->num_kv_heads;
  qk_view packed;
  if (qk_view_of("qkv", qkv, &packed)) return -1;
  if (packed.ndim < 1 || packed.ndim >= QK_RAW_DIMS)
    return qk_raise("ValueError", "qkv: expected 1 to %d dimensions, got %d", QK_RAW_DIMS - 1,
                    packed.ndim);
  long long width = packed.size[packed.ndim - 1];
  if (width % head_dim || width < (long long)(nq + nk) * head_dim)
    return qk_raise("ValueError",
                    "qkv: expected a last dimension that is a multiple of head_dim %d and at least "
                    "(%d + %d) * %d = %lld, got %lld",
                    head_dim, nq, nk, head_dim, (long long)(nq + nk) * head_dim, width);
  if (packed.stride[packed.ndim - 1] != 1)
    return qk_raise("ValueError", "qkv: expected stride 1 in the last dimension, got %lld",
                    packed.stride[packed.ndim - 1]);
  if (qk_overlaps_itself(&packed))
    return qk_raise("ValueError",
                    "qkv: elements share memory with each other (an expanded tensor?); expected "
                    "memory of its own for each");
  packed_side(&packed, "q", 0, nq, head_dim, &o->q);
  packed_side(&packed, "k", nq, nk, head_dim, &o->k);
  return 0;
}

static int output_view(const operands* o, const char* name, const DLTensor* t, const qk_view* in,
                       int dtype, qk_view* v) {
  if (!t) {
    *v = *in;
    return 0;
  }
  int got_dtype;
  char want[128], got[128];
  if (qk_on_device(o, name, t) || qk_float_dtype(name, t, &got_dtype) || qk_view_of(name, t, v))
    return -1;
  if (got_dtype != dtype)
    return qk_raise("TypeError", "%s: expected the dtype of %s, got %s", name, in->name,
                    qk_dtype_name(t->dtype));
  if (v->ndim != in->ndim || memcmp(v->size, in->size, v->ndim * sizeof *v->size))
    return qk_raise("ValueError", "%s: expected shape %s of %s, got %s", name,
                    qk_shape_text(in->size, in->ndim, want, sizeof want), in->name,
                    qk_shape_text(v->size, v->ndim, got, sizeof got));
  if (v->stride[v->ndim - 1] != 1)
    return qk_raise("ValueError", "%s: expected stride 1 in the last dimension, got %lld", name,
                    v->stride[v->ndim - 1]);
  return 0;
}

static int disjoint(const qk_view* a, const qk_view* b, const char* hint) {
  if (!qk_overlap(a, b)) return 0;
  return qk_raise("ValueError", "%s: overlaps the memory of %s; expected %s", a->name, b->name,
                  hint);
}

// Each element is written once, by the part of the call that read it, and nothing else reads it.
static int check_memory(const qk_call* c, const operands* o, int has_q, int has_k) {
  const qk_view* in[2] = {has_q ? &o->q : 0, has_k ? &o->k : 0};
  const qk_view* out[2] = {has_q ? &o->q_out : 0, has_k ? &o->k_out : 0};
  const DLTensor* read[] = {c->q_weight, c->k_weight, c->q_positions,   c->k_positions,
                            c->cos,      c->sin,      c->cos_sin_cache, c->inv_freq};
  const char* names[] = {"q_weight",      "k_weight", c->k_positions ? "positions[0]" : "positions",
                         "positions[1]",  "cos",      "sin",
                         "cos_sin_cache", "inv_freq"};
  for (int i = 0; i < 2; ++i) {
    if (!out[i]) continue;
    if (qk_overlaps_itself(out[i]))
      return qk_raise("ValueError",
                      "%s: elements share memory with each other (an expanded tensor?); expected "
                      "memory of its own for each",
                      out[i]->name);
    if (!qk_same(in[i], out[i]) && disjoint(out[i], in[i], "the same view or separate memory"))
      return -1;
    if (in[1 - i] && disjoint(out[i], in[1 - i], "separate memory")) return -1;
    for (int r = 0; r < 8; ++r) {
      qk_view v;
      if (!read[r]) continue;
      if (qk_view_of(names[r], read[r], &v) || disjoint(out[i], &v, "separate memory")) return -1;
    }
  }
  return out[0] && out[1] ? disjoint(out[0], out[1], "separate memory") : 0;
}

// ---- what goes beside them --------------------------------------------------------------------

static int check_weight(const operands* o, const char* name, const DLTensor* t, int norm,
                        int head_dim, int* dtype, const void** data) {
  *dtype = -1;
  *data = 0;
  if (!t) return 0;
  char got[128];
  qk_view v;
  if (norm == QK_NORM_NONE)
    return qk_raise("ValueError", "%s: expected None, since this side's Norm has kind \"none\"",
                    name);
  if (qk_on_device(o, name, t) || qk_float_dtype(name, t, dtype) || qk_view_of(name, t, &v))
    return -1;
  if (v.ndim != 1 || v.size[0] != head_dim)
    return qk_raise("ValueError", "%s: expected shape [%d], got %s", name, head_dim,
                    qk_shape_text(v.size, v.ndim, got, sizeof got));
  if (v.stride[0] != 1)
    return qk_raise("ValueError", "%s: expected stride 1, got %lld", name, v.stride[0]);
  *data = v.data;
  return 0;
}

// ---- together ---------------------------------------------------------------------------------

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

typedef struct {
  long long q[QK_RAW_DIMS], q_out[QK_RAW_DIMS], k[QK_RAW_DIMS], k_out[QK_RAW_DIMS];
  long long pos[QK_RAW_DIMS], cos[QK_RAW_DIMS], sin[QK_RAW_DIMS];
} walks;

static void set_side(const qk_plan* plan, const qk_view* in, const qk_view* out, int is_k,
                     qk_side* s, long long* in_walk, long long* out_walk) {
  int lead = in->ndim - 2;
  s->x = in->data;
  s->y = out->data;
  s->heads = (int)in->size[lead];
  s->x_head = in->stride[lead];
  s->y_head = out->stride[lead];
  s->eps = is_k ? plan->k_eps : plan->q_eps;
  s->weight_offset = is_k ? plan->k_offset : plan->q_offset;
  memcpy(in_walk, in->stride, lead * sizeof *in_walk);
  memcpy(out_walk, out->stride, lead * sizeof *out_walk);
}

// One part: q, k, or both where they walk the same tokens.
static int make_part(const qk_call* c, const operands* o, int has_q, int has_k, qk_checked* out) {
  const qk_plan* plan = c->plan;
  qk_params* p = &out->part[out->num_parts++];
  const qk_view* lead = has_q ? &o->q : &o->k;
  int rotary = plan->variant.rotary_dim, dtype = out->variant.dtype;
  walks w;
  memset(&w, 0, sizeof w);
  if (has_q) set_side(plan, &o->q, &o->q_out, 0, &p->q, w.q, w.q_out);
  if (has_k) set_side(plan, &o->k, &o->k_out, 1, &p->k, w.k, w.k_out);
  p->early_weights = c->early_weights;
  p->attention_factor = c->cos || c->cos_sin_cache ? 1.0f : plan->attention_factor;
  p->frac = plan->frac;
  if (rotary) {
    if (c->cos) {
      int full, cos_dtype;
      if (qk_check_table(o, "cos", c->cos, lead, rotary, dtype, p, &p->cos, &p->cos_step, w.cos))
        return -1;
      full = p->table_full, cos_dtype = p->table_dtype;
      if (qk_check_table(o, "sin", c->sin, lead, rotary, dtype, p, &p->sin, &p->sin_step, w.sin))
        return -1;
      if (full != p->table_full)
        return qk_raise("ValueError", "sin: expected a last dimension of %d like cos, got %d",
                        full ? rotary : rotary / 2, full ? rotary / 2 : rotary);
      if (cos_dtype != p->table_dtype)
        return qk_raise("TypeError", "sin: expected the dtype of cos, got %s",
                        qk_dtype_name(c->sin->dtype));
    } else {
      if (c->cos_sin_cache && qk_check_cache(o, c->cos_sin_cache, rotary, dtype, p)) return -1;
      if (c->inv_freq && qk_check_inv_freq(o, c->inv_freq, rotary, p)) return -1;
      const DLTensor* t = has_q || !c->k_positions ? c->q_positions : c->k_positions;
      const char* name = c->k_positions ? (has_q ? "positions[0]" : "positions[1]") : "positions";
      if (qk_check_positions(o, name, t, lead, 1, p, w.pos)) return -1;
    }
  }
  long long* strides[] = {w.q, w.q_out, w.k, w.k_out, w.pos, w.cos, w.sin};
  if (coalesce(p, lead->ndim - 2, lead->size, strides, 7)) return -1;
  long long* to[] = {p->q.x_dim, p->q.y_dim, p->k.x_dim, p->k.y_dim,
                     p->pos_dim, p->cos_dim, p->sin_dim};
  for (int i = 0; i < 7; ++i) memcpy(to[i], strides[i], p->ndim * sizeof(long long));
  return 0;
}

static int same_leading(const qk_view* a, const qk_view* b) {
  return a->ndim == b->ndim && !memcmp(a->size, b->size, (a->ndim - 2) * sizeof *a->size);
}

int qk_check(const qk_call* c, qk_checked* out) {
  const qk_plan* plan = c->plan;
  int head_dim = plan->variant.head_dim, dtype, has_q = 1, has_k = 1;
  operands o;
  memset(out, 0, sizeof *out);
  out->variant = plan->variant;
  o.first = c->qkv ? c->qkv : c->q ? c->q : c->k;
  o.first_name = c->qkv ? "qkv" : c->q ? "q" : "k";
  if (!o.first)
    return qk_raise("ValueError", "q, k: expected a tensor for at least one, got None for both");
  int type = o.first->device.device_type;
  o.device_type = type == kDLCUDAHost ? kDLCPU : type;
  o.device_id = o.first->device.device_id;
  if (o.device_type != kDLCPU && o.device_type != kDLCUDA)
    return qk_raise("ValueError", "%s: expected a cpu or cuda tensor, got DLPack device type %d",
                    o.first_name, type);
  if (qk_float_dtype(o.first_name, o.first, &dtype)) return -1;
  if (c->qkv) {
    if (packed_views(plan, c->qkv, &o)) return -1;
  } else {
    has_q = c->q != 0, has_k = c->k != 0;
    if (has_q && heads_view("q", c->q, plan->num_q_heads, head_dim, &o.q)) return -1;
    if (has_k && heads_view("k", c->k, plan->num_kv_heads, head_dim, &o.k)) return -1;
    if (has_q && has_k) {
      if (qk_on_device(&o, "k", c->k)) return -1;
      if (qk_dtype_of(c->k->dtype) != dtype)
        return qk_raise("TypeError", "k: expected the dtype of q (%s), got %s",
                        qk_dtype_name(c->q->dtype), qk_dtype_name(c->k->dtype));
    }
  }
  if (has_q && output_view(&o, "out[0]", c->q_out, &o.q, dtype, &o.q_out)) return -1;
  if (has_k && output_view(&o, "out[1]", c->k_out, &o.k, dtype, &o.k_out)) return -1;
  if (c->q_out && !has_q) return qk_raise("ValueError", "out[0]: expected None, since q is None");
  if (c->k_out && !has_k) return qk_raise("ValueError", "out[1]: expected None, since k is None");

  out->variant.dtype = dtype;
  const void *q_weight, *k_weight;
  if (check_weight(&o, "q_weight", c->q_weight, plan->variant.q_norm, head_dim,
                   &out->variant.q_weight_dtype, &q_weight) ||
      check_weight(&o, "k_weight", c->k_weight, plan->variant.k_norm, head_dim,
                   &out->variant.k_weight_dtype, &k_weight))
    return -1;
  int rotates = plan->variant.rotary_dim > 0;
  out->variant.angle = !rotates                     ? QK_ANGLE_NONE
                       : c->cos || c->cos_sin_cache ? QK_ANGLE_TABLE
                       : c->inv_freq                ? QK_ANGLE_INV_FREQ
                                                    : QK_ANGLE_PHASE;
  out->device_type = o.device_type;
  out->device_id = o.device_id;

  // q and k walk the tokens together unless each has positions of its own.
  int together = has_q && has_k && !c->k_positions && same_leading(&o.q, &o.k);
  char q_text[128], k_text[128];
  if (has_q && has_k && !together && !c->k_positions && rotates)
    return qk_raise("ValueError",
                    "k: expected the leading dimensions of q, %s, got %s; give "
                    "positions=(q_positions, k_positions) where the lengths differ",
                    qk_shape_text(o.q.size, o.q.ndim - 2, q_text, sizeof q_text),
                    qk_shape_text(o.k.size, o.k.ndim - 2, k_text, sizeof k_text));
  if (together) {
    if (make_part(c, &o, 1, 1, out)) return -1;
  } else {
    if (has_q && make_part(c, &o, 1, 0, out)) return -1;
    if (has_k && make_part(c, &o, 0, 1, out)) return -1;
  }
  for (int i = 0; i < out->num_parts; ++i) {  // no weight: all ones, and then no offset either
    qk_params* p = &out->part[i];
    if (!(p->q.weight = q_weight)) p->q.weight_offset = 0.0f;
    if (!(p->k.weight = k_weight)) p->k.weight_offset = 0.0f;
  }
  return check_memory(c, &o, has_q, has_k);
}
