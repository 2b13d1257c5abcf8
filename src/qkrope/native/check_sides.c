// check_sides.c: the boundary's part for q, k and v: what they are, where they go, and the weights,
// biases and scales that belong to one of them.
#include <stdio.h>
#include <string.h>

#include "check.h"

// ---- q, k, v and their outputs ----------------------------------------------------------------

static int unit_stride(const char* name, const qk_view* v) {
  if (v->stride[v->ndim - 1] == 1) return 0;
  return qk_raise("ValueError", "%s: expected stride 1 in the last dimension, got %lld", name,
                  v->stride[v->ndim - 1]);
}

static int heads_view(const char* name, const DLTensor* t, int heads, int head_dim, qk_view* v) {
  if (qk_view_of(name, t, v)) return -1;
  char got[128];
  if (v->ndim < 2 || v->size[v->ndim - 1] != head_dim || v->size[v->ndim - 2] != heads)
    return qk_raise("ValueError", "%s: expected shape [..., %d heads, %d head_dim], got %s", name,
                    heads, head_dim, qk_shape_text(v->size, v->ndim, got, sizeof got));
  return unit_stride(name, v);
}

// The columns of one side of packed [..., (nq+nk+nv)*head_dim] as [..., heads, head_dim].
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
  long long width = packed.size[packed.ndim - 1], least = (long long)(nq + nk) * head_dim;
  if (width % head_dim || width < least)
    return qk_raise("ValueError",
                    "qkv: expected a last dimension that is a multiple of head_dim %d and at least "
                    "(%d + %d) * %d = %lld, got %lld",
                    head_dim, nq, nk, head_dim, least, width);
  if (plan->has_v && width != least + (long long)nk * head_dim)
    return qk_raise("ValueError",
                    "qkv: expected a last dimension of (%d + %d + %d) * %d = %lld since the Spec "
                    "has a v_norm, got %lld",
                    nq, nk, nk, head_dim, least + (long long)nk * head_dim, width);
  if (unit_stride("qkv", &packed)) return -1;
  if (qk_overlaps_itself(&packed))
    return qk_raise("ValueError",
                    "qkv: elements share memory with each other (an expanded tensor?); expected "
                    "memory of its own for each");
  packed_side(&packed, "q", 0, nq, head_dim, &o->in[Q]);
  packed_side(&packed, "k", nq, nk, head_dim, &o->in[K]);
  packed_side(&packed, "v", nq + nk, nk, head_dim, &o->in[V]);
  o->has[Q] = o->has[K] = 1;
  o->has[V] = plan->has_v;
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
  return unit_stride(name, v);
}

int qk_check_sides(const qk_call* c, operands* o, int* dtype) {
  static const char *names[] = {"q", "k", "v"}, *outs[] = {"out[0]", "out[1]", "out[2]"};
  const qk_plan* plan = c->plan;
  const DLTensor* given[] = {c->q, c->k, c->v};
  const DLTensor* out[] = {c->q_out, c->k_out, c->v_out};
  o->first = c->qkv ? c->qkv : c->q ? c->q : c->k;
  o->first_name = c->qkv ? "qkv" : c->q ? "q" : "k";
  if (!o->first && c->backward) o->first = c->v, o->first_name = "v";  // the only one that is used
  if (!o->first)
    return qk_raise("ValueError", "q, k: expected a tensor for at least one, got None for both");
  if (c->v && !plan->has_v)
    return qk_raise("ValueError", "v: expected None, since the Spec has no v_norm, got a tensor");
  int type = o->first->device.device_type;
  o->device_type = c->as_cuda ? kDLCUDA : type == kDLCUDAHost ? kDLCPU : type;
  o->device_id = o->first->device.device_id;
  if (o->device_type != kDLCPU && o->device_type != kDLCUDA)
    return qk_raise("ValueError", "%s: expected a cpu or cuda tensor, got DLPack device type %d",
                    o->first_name, type);
  if (qk_float_dtype(o->first_name, o->first, dtype)) return -1;
  if (c->qkv && packed_views(plan, c->qkv, o)) return -1;
  for (int i = 0; i < SIDES && !c->qkv; ++i) {
    int heads = i == Q ? plan->num_q_heads : plan->num_kv_heads;
    if (!given[i]) continue;
    if (heads_view(names[i], given[i], heads, plan->variant.head_dim, &o->in[i])) return -1;
    o->has[i] = 1;
  }
  for (int i = 0; i < SIDES && !c->qkv; ++i) {
    if (!given[i] || given[i] == o->first) continue;
    if (qk_on_device(o, names[i], given[i])) return -1;
    if (qk_dtype_of(given[i]->dtype) != *dtype)
      return qk_raise("TypeError", "%s: expected the dtype of %s (%s), got %s", names[i],
                      o->first_name, qk_dtype_name(o->first->dtype),
                      qk_dtype_name(given[i]->dtype));
  }
  for (int i = 0; i < SIDES; ++i) {
    if (o->has[i] && output_view(o, outs[i], out[i], &o->in[i], *dtype, &o->out[i])) return -1;
    if (out[i] && !o->has[i])
      return qk_raise("ValueError", "%s: expected None, since %s is None", outs[i], names[i]);
  }
  if (c->v_weight && !o->has[V])
    return qk_raise("ValueError",
                    "v_weight: expected None without a v that is normalised, got a "
                    "tensor");
  return 0;
}

static int disjoint(const qk_view* a, const qk_view* b, const char* hint) {
  if (!qk_overlap(a, b)) return 0;
  return qk_raise("ValueError", "%s: overlaps the memory of %s; expected %s", a->name, b->name,
                  hint);
}

// Each element is written once, by the part of the call that read it, and nothing else reads it.
int qk_check_memory(const qk_call* c, const operands* o) {
  struct {
    const char* name;
    const DLTensor* t;
  } read[] = {{"q_weight", c->q_weight},
              {"k_weight", c->k_weight},
              {"v_weight", c->v_weight},
              {"q_bias", c->q_bias},
              {"k_bias", c->k_bias},
              {"q_scale", c->q_scale_of},
              {"k_scale", c->k_scale_of},
              {c->k_positions ? "positions[0]" : "positions", c->q_positions},
              {"positions[1]", c->k_positions},
              {c->k_cos ? "q cos" : "cos", c->cos},
              {c->k_cos ? "q sin" : "sin", c->sin},
              {"k cos", c->k_cos},
              {"k sin", c->k_sin},
              {"cos_sin_cache", c->cos_sin_cache},
              {"inv_freq", c->inv_freq},
              {"dq_out", c->q_dy},
              {"dk_out", c->k_dy},
              {"dv_out", c->v_dy}};
  for (int i = 0; i < SIDES; ++i) {
    const qk_view* out = &o->out[i];
    if (!o->has[i]) continue;
    if (qk_overlaps_itself(out))
      return qk_raise("ValueError",
                      "%s: elements share memory with each other (an expanded tensor?); expected "
                      "memory of its own for each",
                      out->name);
    if (!qk_same(&o->in[i], out) && disjoint(out, &o->in[i], "the same view or separate memory"))
      return -1;
    for (int j = 0; j < SIDES; ++j)
      if (j != i && o->has[j] && disjoint(out, &o->in[j], "separate memory")) return -1;
    for (unsigned r = 0; r < sizeof read / sizeof *read; ++r) {
      qk_view v;
      if (!read[r].t) continue;
      if (qk_view_of(read[r].name, read[r].t, &v) || disjoint(out, &v, "separate memory"))
        return -1;
    }
  }
  for (int i = 0; i < SIDES; ++i)
    for (int j = i + 1; j < SIDES; ++j)
      if (o->has[i] && o->has[j] && disjoint(&o->out[i], &o->out[j], "separate memory")) return -1;
  return 0;
}

// ---- what goes beside one of them -------------------------------------------------------------

// A weight or bias: [width], a row for each head, or with one statistic a token all in one row.
static int check_row(const operands* o, const char* name, const DLTensor* t,
                     const qk_side_variant* spec, int heads, int* dtype, const void** data,
                     long long* head) {
  char got[128], flat[64] = "";
  qk_view v;
  const long long width = spec->weight_dim;
  if (!t) return 0;
  if (spec->norm == QK_NORM_NONE)
    return qk_raise("ValueError", "%s: expected None, since this side's Norm has kind \"none\"",
                    name);
  if (qk_on_device(o, name, t) || qk_float_dtype(name, t, dtype) || qk_view_of(name, t, &v))
    return -1;
  const long long last = v.ndim ? v.size[v.ndim - 1] : 0;
  const int one = v.ndim == 1 && last == width, all = v.ndim == 1 && last == heads * width;
  const int rows = v.ndim == 2 && last == width && v.size[0] == heads;
  if (spec->row) snprintf(flat, sizeof flat, ", [%lld]", heads * width);
  if (!one && !rows && !(spec->row && all))
    return qk_raise("ValueError", "%s: expected shape [%lld]%s or [%d, %lld], got %s", name, width,
                    flat, heads, width, qk_shape_text(v.size, v.ndim, got, sizeof got));
  if (last > 1 && v.stride[v.ndim - 1] != 1)
    return qk_raise("ValueError", "%s: expected stride 1, got %lld", name, v.stride[v.ndim - 1]);
  *data = v.data;
  *head = one || heads == 1 ? 0 : rows ? v.stride[0] : width;
  return 0;
}

int qk_check_side(const qk_call* c, const operands* o, int side, qk_variant* v, qk_side* to) {
  static const char* weights[] = {"q_weight", "k_weight", "v_weight"};
  static const char* biases[] = {"q_bias", "k_bias", "v_bias"};
  const DLTensor* weight[] = {c->q_weight, c->k_weight, c->v_weight};
  const DLTensor* bias[] = {c->q_bias, c->k_bias, 0};
  const qk_side_variant* spec[] = {&v->q, &v->k, &v->v};
  const qk_norm_numbers* numbers[] = {&c->plan->q, &c->plan->k, &c->plan->v};
  int* dtype[] = {&v->q_weight_dtype, &v->k_weight_dtype, &v->v_weight_dtype};
  const qk_view *x = &o->in[side], *y = &o->out[side];
  const int lead = x->ndim - 2;
  to->x = x->data;
  to->y = y->data;
  to->heads = (int)x->size[lead];
  to->x_head = x->stride[lead];
  to->y_head = y->stride[lead];
  to->eps = numbers[side]->eps;
  to->rest_eps = numbers[side]->rest_eps;
  if (check_row(o, weights[side], weight[side], spec[side], to->heads, dtype[side], &to->weight,
                &to->weight_head) ||
      check_row(o, biases[side], bias[side], spec[side], to->heads, &to->bias_dtype, &to->bias,
                &to->bias_head))
    return -1;
  if (to->weight) {  // without one: all ones, and then no offset either
    to->weight_offset = numbers[side]->offset;
    to->rest_offset = numbers[side]->rest_offset;
  }
  return 0;
}

// A scale that broadcasts to [..., heads, head_dim].
int qk_check_scale(const qk_call* c, const operands* o, int side, int dtype, qk_side* to,
                   long long* stride) {
  static const char* names[] = {"q_scale", "k_scale"};
  const DLTensor* t = side == Q ? c->q_scale_of : side == K ? c->k_scale_of : 0;
  const char* name = names[side == K];
  const qk_view* x = &o->in[side];
  qk_view v;
  char want[128], got[128];
  to->scale = side == Q ? c->q_scale : side == K ? c->k_scale : 1.0f;
  if (!t) return 0;
  if (qk_like_dtype(o, name, t, dtype, &to->scale_dtype) || qk_view_of(name, t, &v)) return -1;
  long long walk[QK_RAW_DIMS];
  int fits = v.ndim <= x->ndim;
  for (int d = 0; fits && d < x->ndim; ++d) {
    const int at = d - (x->ndim - v.ndim);
    walk[d] = at < 0 || v.size[at] == 1 ? 0 : v.stride[at];
    fits = at < 0 || v.size[at] == 1 || v.size[at] == x->size[d];
  }
  if (!fits)
    return qk_raise("ValueError", "%s: expected a shape that broadcasts to %s of %s, got %s", name,
                    qk_shape_text(x->size, x->ndim, want, sizeof want), x->name,
                    qk_shape_text(v.size, v.ndim, got, sizeof got));
  to->scale_of = v.data;
  to->scale_head = walk[x->ndim - 2];
  to->scale_channel = walk[x->ndim - 1];
  memcpy(stride, walk, (x->ndim - 2) * sizeof *walk);
  return 0;
}
