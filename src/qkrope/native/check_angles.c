// check_angles.c: the boundary's part for positions, cos/sin tables and frequencies.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "check.h"

// The text of one that no kernel reads lives until the next such call.
const char* qk_dtype_name(DLDataType t) {
  static const char* kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  static _Thread_local char text[32];
  if (t.code == kDLFloat && t.bits == 32) return "float32";
  if (t.code == kDLFloat && t.bits == 16) return "float16";
  if (t.code == kDLBfloat && t.bits == 16) return "bfloat16";
  if (t.code == kDLBool) return "bool";
  if (t.code > kDLBool) return t.bits == 8 ? "a float8" : "another type";
  snprintf(text, sizeof text, "%s%d", kinds[t.code], t.bits);
  return text;
}

int qk_dtype_of(DLDataType t) {
  if (t.lanes != 1) return -1;
  if (t.code == kDLBfloat && t.bits == 16) return QK_BF16;
  if (t.code != kDLFloat) return -1;
  return t.bits == 32 ? QK_F32 : t.bits == 16 ? QK_F16 : t.bits == 64 ? QK_F64 : -1;
}

int qk_float_dtype(const char* name, const DLTensor* t, int* dtype) {
  *dtype = qk_dtype_of(t->dtype);
  if (*dtype >= 0 && *dtype != QK_F64) return 0;
  return qk_raise("TypeError", "%s: expected float32, bfloat16 or float16, got %s", name,
                  qk_dtype_name(t->dtype));
}

int qk_on_device(const operands* o, const char* name, const DLTensor* t) {
  if (t->device.device_type == o->first->device.device_type &&
      t->device.device_id == o->first->device.device_id)
    return 0;
  static const char* kinds[] = {"?", "cpu", "cuda"};
  int got = t->device.device_type, want = o->first->device.device_type;
  return qk_raise("ValueError", "%s: expected device %s:%d like %s, got %s:%d", name,
                  want <= 2 ? kinds[want] : "?", o->first->device.device_id, o->first_name,
                  got <= 2 ? kinds[got] : "an unsupported kind", t->device.device_id);
}

// Strides that walk `v` (its first `dims` dimensions) along the leading dimensions of `to`.
static int broadcast(const char* name, const qk_view* v, int dims, const qk_view* to,
                     long long* stride) {
  int lead = to->ndim - 2, skip = lead - dims;
  char got[128], want[128];
  for (int d = 0; d < lead; ++d) {
    int at = d - skip;
    stride[d] = at < 0 || v->size[at] == 1 ? 0 : v->stride[at];
    if (at >= 0 && v->size[at] != 1 && v->size[at] != to->size[d]) skip = -1;
    if (skip < 0) break;
  }
  if (skip >= 0) return 0;
  return qk_raise("ValueError",
                  "%s: expected leading dimensions that broadcast to %s of %s, got shape %s", name,
                  qk_shape_text(to->size, lead, want, sizeof want), to->name,
                  qk_shape_text(v->size, v->ndim, got, sizeof got));
}

static int out_of_range(const qk_view* v, int wide, int dim, long long at, long long low,
                        long long high, long long* bad) {
  if (dim == v->ndim) {
    long long p = wide ? ((const int64_t*)v->data)[at] : ((const int32_t*)v->data)[at];
    *bad = p;
    return p < low || p > high;
  }
  for (long long i = 0; i < v->size[dim]; ++i)
    if (out_of_range(v, wide, dim + 1, at + i * v->stride[dim], low, high, bad)) return 1;
  return 0;
}

// The tokens that turn: of the last leading dimension, [from, to).
typedef struct {
  long long from, to;
} range;

static int check_positions(const operands* o, const char* name, const DLTensor* t,
                           const qk_view* lead, range turning, int axes, qk_params* p,
                           long long* stride) {
  char got[128];
  qk_view v;
  if (!t)
    return qk_raise("ValueError",
                    "%s: expected an int32 or int64 tensor, got None (the Spec rotates and no "
                    "cos_sin is given)",
                    name);
  if (t->dtype.code != kDLInt || t->dtype.lanes != 1 ||
      (t->dtype.bits != 32 && t->dtype.bits != 64))
    return qk_raise("TypeError", "%s: expected int32 or int64, got %s", name,
                    qk_dtype_name(t->dtype));
  if (qk_on_device(o, name, t) || qk_view_of(name, t, &v)) return -1;
  qk_view one = v;  // of the positions on one axis
  if (axes) {
    if (!v.ndim || v.size[0] != axes)
      return qk_raise("ValueError", "%s: expected shape [%d axes, ...], got %s", name, axes,
                      qk_shape_text(v.size, v.ndim, got, sizeof got));
    p->pos_axis = v.stride[0];
    one.ndim = v.ndim - 1;
    memmove(one.size, one.size + 1, one.ndim * sizeof *one.size);
    memmove(one.stride, one.stride + 1, one.ndim * sizeof *one.stride);
  }
  if (broadcast(name, &one, one.ndim, lead, stride)) return -1;
  p->pos = v.data;
  p->pos_wide = t->dtype.bits == 64;
  if (o->device_type != kDLCPU) return 0;  // CUDA: such a position gives NaN, in the kernel
  long long low = p->table_rows ? 0 : INT32_MIN, bad;
  long long high = p->table_rows ? p->table_rows - 1 : INT32_MAX;
  const int last = v.ndim - 1;
  if (one.ndim && v.size[last] == lead->size[lead->ndim - 3] && v.size[last] > 1) {
    v.data += turning.from * v.stride[last] * v.item;
    v.size[last] = turning.to - turning.from;
  }
  if (qk_view_count(lead) && turning.from < turning.to &&
      out_of_range(&v, p->pos_wide, 0, 0, low, high, &bad))
    return qk_raise("ValueError", "%s: expected values in [%lld, %lld]%s, got %lld", name, low,
                    high, p->table_rows ? " (rows of cos_sin_cache)" : "", bad);
  return 0;
}

int qk_like_dtype(const operands* o, const char* name, const DLTensor* t, int dtype, int* out) {
  if (qk_on_device(o, name, t)) return -1;
  *out = qk_dtype_of(t->dtype);
  if (*out == QK_F32 || *out == dtype) return 0;
  return qk_raise("TypeError", "%s: expected float32 or the dtype of q and k, got %s", name,
                  qk_dtype_name(t->dtype));
}

// What is the same of a cosine and a sine.
typedef struct {
  int full, dtype, heads;
} form;

// One of cos and sin: a row for each token that turns, and for each head where it has as many
// dimensions as q.
static int check_table(const operands* o, const char* name, const DLTensor* t, const int* sides,
                       const qk_view* lead, range turning, int rotary, int dtype, form* is,
                       const void** data, long long* step, long long* head, long long* stride) {
  qk_view v, tokens = *lead;
  char got[128];
  if (qk_like_dtype(o, name, t, dtype, &is->dtype) || qk_view_of(name, t, &v)) return -1;
  long long last = v.ndim ? v.size[v.ndim - 1] : 0;
  if (last != rotary && last != rotary / 2)
    return qk_raise("ValueError",
                    "%s: expected a last dimension of %d (one value a pair) or %d (one a channel), "
                    "got shape %s",
                    name, rotary / 2, rotary, qk_shape_text(v.size, v.ndim, got, sizeof got));
  is->full = last == rotary;
  is->heads = v.ndim == lead->ndim;
  for (int i = 0; is->heads && i < V; ++i) {
    const long long heads = v.size[v.ndim - 2], want = o->in[i].size[lead->ndim - 2];
    if (sides[i] && heads != 1 && heads != want)
      return qk_raise("ValueError",
                      "%s: expected a row for each of the %lld heads of %s, or one, got shape %s",
                      name, want, o->in[i].name, qk_shape_text(v.size, v.ndim, got, sizeof got));
    *head = heads == 1 ? 0 : v.stride[v.ndim - 2];
  }
  if (lead->ndim > 2) tokens.size[lead->ndim - 3] = turning.to - turning.from;
  if (broadcast(name, &v, v.ndim - 1 - is->heads, &tokens, stride)) return -1;
  *data = v.data;
  // The kernels count a table's rows from the first token, turning or not.
  if (lead->ndim > 2)
    *data = (const void*)((uintptr_t)v.data - turning.from * stride[lead->ndim - 3] * v.item);
  *step = v.stride[v.ndim - 1];
  return 0;
}

static int check_tables(const qk_call* c, const operands* o, const int* sides, const qk_view* lead,
                        range turning, int rotary, int dtype, qk_params* p, long long* cos_stride,
                        long long* sin_stride) {
  static const char* names[3][2] = {{"cos", "sin"}, {"q cos", "q sin"}, {"k cos", "k sin"}};
  const DLTensor *cos = c->cos, *sin = c->sin;
  const char** name = names[c->k_cos ? 1 : 0];
  if (c->k_cos && !sides[Q]) cos = c->k_cos, sin = c->k_sin, name = names[2];
  if (!cos || !sin)
    return qk_raise("ValueError", "%s: expected a tensor beside the other's, got None",
                    name[cos != 0]);
  form a, b;
  if (check_table(o, name[0], cos, sides, lead, turning, rotary, dtype, &a, &p->cos, &p->cos_step,
                  &p->cos_head, cos_stride) ||
      check_table(o, name[1], sin, sides, lead, turning, rotary, dtype, &b, &p->sin, &p->sin_step,
                  &p->sin_head, sin_stride))
    return -1;
  if (a.full != b.full)
    return qk_raise("ValueError", "%s: expected a last dimension of %d like %s, got %d", name[1],
                    a.full ? rotary : rotary / 2, name[0], a.full ? rotary / 2 : rotary);
  if (a.dtype != b.dtype)
    return qk_raise("TypeError", "%s: expected the dtype of %s, got %s", name[1], name[0],
                    qk_dtype_name(sin->dtype));
  p->table_full = a.full;
  p->table_dtype = a.dtype;
  p->table_heads = (a.heads && p->cos_head) || (b.heads && p->sin_head);
  return 0;
}

static int check_cache(const operands* o, const DLTensor* t, int rotary, int dtype, qk_params* p) {
  qk_view v;
  char got[128];
  if (qk_like_dtype(o, "cos_sin_cache", t, dtype, &p->table_dtype) ||
      qk_view_of("cos_sin_cache", t, &v))
    return -1;
  if (v.ndim != 2 || v.size[1] != rotary || v.size[0] < 1)
    return qk_raise("ValueError",
                    "cos_sin_cache: expected shape [max_position, %d] = [cos | sin], got %s",
                    rotary, qk_shape_text(v.size, v.ndim, got, sizeof got));
  p->table_rows = v.size[0];
  p->cos = v.data;
  p->sin = v.data + v.stride[1] * (rotary / 2) * v.item;
  p->cos_step = p->sin_step = v.stride[1];
  p->cos_row = p->sin_row = v.stride[0];
  return 0;
}

static int check_inv_freq(const operands* o, const DLTensor* t, int rotary, qk_params* p) {
  qk_view v;
  char got[128];
  if (qk_on_device(o, "inv_freq", t)) return -1;
  p->inv_freq_dtype = qk_dtype_of(t->dtype);
  if (p->inv_freq_dtype != QK_F32 && p->inv_freq_dtype != QK_F64)
    return qk_raise("TypeError", "inv_freq: expected float32 or float64, got %s",
                    qk_dtype_name(t->dtype));
  if (qk_view_of("inv_freq", t, &v)) return -1;
  if (v.ndim != 1 || v.size[0] != rotary / 2)
    return qk_raise("ValueError", "inv_freq: expected shape [%d], got %s", rotary / 2,
                    qk_shape_text(v.size, v.ndim, got, sizeof got));
  p->inv_freq = v.data;
  p->inv_freq_step = v.stride[0];
  if (o->device_type != kDLCPU) return 0;  // CUDA: such a pair gives NaN, in the kernel
  for (long long i = 0; i < v.size[0]; ++i) {
    long long at = i * v.stride[0];
    double f =
        p->inv_freq_dtype == QK_F64 ? ((const double*)v.data)[at] : ((const float*)v.data)[at];
    if (!(f - f == 0.0))
      return qk_raise("ValueError", "inv_freq: expected finite values, got %g at %lld", f, i);
  }
  return 0;
}

static int check_range(const qk_call* c, const qk_view* lead, qk_params* p, range* turning) {
  const int given = c->rotate_from != 0 || c->rotate_to >= 0;
  const long long count = lead->ndim > 2 ? lead->size[lead->ndim - 3] : given ? 0 : 1;
  turning->from = c->rotate_from;
  turning->to = c->rotate_to < 0 ? count : c->rotate_to;
  if (turning->from > turning->to || turning->to > count || (given && lead->ndim == 2))
    return qk_raise("ValueError",
                    "rotate_from, rotate_to: expected a range within the %lld tokens of %s, got "
                    "[%lld, %lld)",
                    count, lead->name, turning->from, turning->to);
  p->last_size = count > 0 ? count : 1;
  p->rotate_from = turning->from;
  p->rotate_to = turning->to;
  p->general |= turning->from != 0 || turning->to != count;
  return 0;
}

int qk_check_angles(const qk_call* c, const operands* o, const int* sides, const qk_view* lead,
                    int dtype, qk_params* p, long long* pos, long long* cos, long long* sin) {
  const qk_plan* plan = c->plan;
  const int rotary = plan->variant.rotary_dim, tables = c->cos || c->k_cos;
  range turning;
  p->early_weights = c->early_weights;
  p->attention_factor = tables || c->cos_sin_cache ? 1.0f : plan->attention_factor;
  p->frac = plan->frac;
  p->pairs = plan->pairs;
  p->last_size = p->rotate_to = 1;
  if (!rotary || (!sides[Q] && !sides[K])) return 0;
  if (check_range(c, lead, p, &turning)) return -1;
  if (tables) {
    if (check_tables(c, o, sides, lead, turning, rotary, dtype, p, cos, sin)) return -1;
    p->general |= p->table_heads;
    return 0;
  }
  if (c->cos_sin_cache && check_cache(o, c->cos_sin_cache, rotary, dtype, p)) return -1;
  if (c->inv_freq && check_inv_freq(o, c->inv_freq, rotary, p)) return -1;
  p->general |= plan->variant.axes && c->cos_sin_cache;  // a row for each axis
  const DLTensor* t = sides[Q] || !c->k_positions ? c->q_positions : c->k_positions;
  const char* name = c->k_positions ? (sides[Q] ? "positions[0]" : "positions[1]") : "positions";
  return check_positions(o, name, t, lead, turning, plan->variant.axes, p, pos);
}
