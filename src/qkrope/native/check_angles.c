// check_angles.c: the boundary's part for positions, cos/sin tables and frequencies.
#include <stdint.h>
#include <stdio.h>

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

int qk_check_positions(const operands* o, const char* name, const DLTensor* t, const qk_view* to,
                       int required, qk_params* p, long long* stride) {
  if (!t)
    return required ? qk_raise("ValueError",
                               "%s: expected an int32 or int64 tensor, got None (the Spec rotates "
                               "and no cos_sin is given)",
                               name)
                    : 0;
  qk_view v;
  if (t->dtype.code != kDLInt || t->dtype.lanes != 1 ||
      (t->dtype.bits != 32 && t->dtype.bits != 64))
    return qk_raise("TypeError", "%s: expected int32 or int64, got %s", name,
                    qk_dtype_name(t->dtype));
  if (qk_on_device(o, name, t) || qk_view_of(name, t, &v) ||
      broadcast(name, &v, v.ndim, to, stride))
    return -1;
  p->pos = v.data;
  p->pos_wide = t->dtype.bits == 64;
  if (o->device_type != kDLCPU) return 0;  // CUDA: such a position gives NaN, in the kernel
  long long low = p->table_rows ? 0 : INT32_MIN, bad;
  long long high = p->table_rows ? p->table_rows - 1 : INT32_MAX;
  if (qk_view_count(to) && out_of_range(&v, p->pos_wide, 0, 0, low, high, &bad))
    return qk_raise("ValueError", "%s: expected values in [%lld, %lld]%s, got %lld", name, low,
                    high, p->table_rows ? " (rows of cos_sin_cache)" : "", bad);
  return 0;
}

static int table_dtype(const operands* o, const char* name, const DLTensor* t, int dtype,
                       int* out) {
  if (qk_on_device(o, name, t)) return -1;
  *out = qk_dtype_of(t->dtype);
  if (*out == QK_F32 || *out == dtype) return 0;
  return qk_raise("TypeError", "%s: expected float32 or the dtype of q and k, got %s", name,
                  qk_dtype_name(t->dtype));
}

int qk_check_table(const operands* o, const char* name, const DLTensor* t, const qk_view* to,
                   int rotary, int dtype, qk_params* p, const void** data, long long* step,
                   long long* stride) {
  qk_view v;
  char got[128];
  if (table_dtype(o, name, t, dtype, &p->table_dtype) || qk_view_of(name, t, &v)) return -1;
  long long last = v.ndim ? v.size[v.ndim - 1] : 0;
  if (last != rotary && last != rotary / 2)
    return qk_raise("ValueError",
                    "%s: expected a last dimension of %d (one value a pair) or %d (one a channel), "
                    "got shape %s",
                    name, rotary / 2, rotary, qk_shape_text(v.size, v.ndim, got, sizeof got));
  if (broadcast(name, &v, v.ndim - 1, to, stride)) return -1;
  *data = v.data;
  *step = v.stride[v.ndim - 1];
  p->table_full = last == rotary;
  return 0;
}

int qk_check_cache(const operands* o, const DLTensor* t, int rotary, int dtype, qk_params* p) {
  qk_view v;
  char got[128];
  if (table_dtype(o, "cos_sin_cache", t, dtype, &p->table_dtype) ||
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

int qk_check_inv_freq(const operands* o, const DLTensor* t, int rotary, qk_params* p) {
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
