// view.c: overlap of strided views, and error texts.
#include "view.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

#include "plan.h"

int qk_raise(const char* kind, const char* format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  TVMFFIErrorSetRaisedFromCStr(kind, text);
  return -1;
}

int qk_view_of(const char* name, const DLTensor* tensor, qk_view* out) {
  if (tensor->ndim > QK_RAW_DIMS)
    return qk_raise("ValueError", "%s: got %d dimensions, expected at most %d", name, tensor->ndim,
                    QK_RAW_DIMS);
  out->name = name;
  out->data = (char*)tensor->data + tensor->byte_offset;
  out->item = tensor->dtype.bits / 8;
  out->ndim = tensor->ndim;
  long long dense = 1;
  for (int d = tensor->ndim - 1; d >= 0; --d) {
    out->size[d] = tensor->shape[d];
    out->stride[d] = tensor->strides ? tensor->strides[d] : dense;
    dense *= tensor->shape[d];
  }
  if (!tensor->data && dense)
    return qk_raise("ValueError",
                    "%s: expected a tensor with memory, got one without (a fake one?)", name);
  return 0;
}

long long qk_view_count(const qk_view* view) {
  long long count = 1;
  for (int d = 0; d < view->ndim; ++d) count *= view->size[d];
  return count;
}

const char* qk_shape_text(const long long* size, int ndim, char* buffer, int capacity) {
  int used = snprintf(buffer, capacity, "[");
  for (int d = 0; d < ndim && used < capacity; ++d)
    used += snprintf(buffer + used, capacity - used, d ? ", %lld" : "%lld", size[d]);
  if (used < capacity) snprintf(buffer + used, capacity - used, "]");
  return buffer;
}

int qk_same(const qk_view* a, const qk_view* b) {
  if (a->data != b->data || a->item != b->item || a->ndim != b->ndim) return 0;
  for (int d = 0; d < a->ndim; ++d) {
    if (a->size[d] != b->size[d]) return 0;
    if (a->size[d] > 1 && a->stride[d] != b->stride[d]) return 0;
  }
  return 1;
}

// A view in bytes: dimensions above size one, widest stride first, all strides non-negative.
typedef struct {
  char* low;
  int ndim;
  long long size[QK_RAW_DIMS + 1], stride[QK_RAW_DIMS + 1];
  long long extent[QK_RAW_DIMS + 2];  // bytes that dimensions d.. span
} lattice;

static void lattice_of(const qk_view* view, lattice* out) {
  out->low = view->data;
  out->ndim = 0;
  for (int d = 0; d <= view->ndim; ++d) {
    // The bytes of an element are the innermost dimension.
    long long size = d < view->ndim ? view->size[d] : view->item;
    long long stride = d < view->ndim ? view->stride[d] * view->item : 1;
    if (size <= 1) continue;
    if (stride < 0) out->low += stride * (size - 1), stride = -stride;
    int at = out->ndim++;
    for (; at > 0 && out->stride[at - 1] < stride; --at) {
      out->size[at] = out->size[at - 1];
      out->stride[at] = out->stride[at - 1];
    }
    out->size[at] = size;
    out->stride[at] = stride;
  }
  // A dimension that continues the next one is one run with it.
  int kept = 0;
  for (int d = 0; d < out->ndim; ++d) {
    if (kept && out->stride[kept - 1] == out->stride[d] * out->size[d]) {
      out->size[kept - 1] *= out->size[d];
      out->stride[kept - 1] = out->stride[d];
    } else {
      out->size[kept] = out->size[d];
      out->stride[kept++] = out->stride[d];
    }
  }
  out->ndim = kept;
  out->extent[kept] = 1;
  for (int d = kept - 1; d >= 0; --d)
    out->extent[d] = out->extent[d + 1] + out->stride[d] * (out->size[d] - 1);
}

int qk_overlaps_itself(const qk_view* view) {
  if (qk_view_count(view) == 0) return 0;
  lattice l;
  lattice_of(view, &l);
  for (int d = 0; d < l.ndim; ++d)
    if (l.stride[d] < l.extent[d + 1]) return 1;
  return 0;
}

// Does a (dimensions i..) meet b (dimensions j..) placed `shift` bytes above it?
static int meet(const lattice* a, int i, const lattice* b, int j, long long shift, int* budget) {
  if (shift >= a->extent[i] || -shift >= b->extent[j]) return 0;
  if (--*budget < 0) return 1;
  if (i == a->ndim && j == b->ndim) return 1;
  int in_a = i < a->ndim, in_b = j < b->ndim;
  // One dense run each: their spans meet, so they do.
  if ((!in_a || (i == a->ndim - 1 && a->stride[i] == 1)) &&
      (!in_b || (j == b->ndim - 1 && b->stride[j] == 1)))
    return 1;
  long long stride, first, last, above, below;
  int next_i = i, next_j = j;
  if (in_a && in_b && a->stride[i] == b->stride[j]) {
    // Rows of one pitch: only how far apart two rows are matters.
    stride = a->stride[i];
    first = -(a->size[i] - 1);
    last = b->size[j] - 1;
    next_i = i + 1, next_j = j + 1;
  } else if (in_b && (!in_a || b->stride[j] > a->stride[i])) {
    stride = b->stride[j];
    first = 0, last = b->size[j] - 1;
    next_j = j + 1;
  } else {
    stride = a->stride[i];
    first = -(a->size[i] - 1), last = 0;
    next_i = i + 1;
  }
  if (stride == 0) return meet(a, next_i, b, next_j, shift, budget);  // an expanded input
  // Rows r with shift + r * stride in (-extent_b, extent_a).
  above = a->extent[next_i] - 1 - shift;
  below = -(b->extent[next_j] - 1) - shift;
  long long high = above >= 0 ? above / stride : -((-above + stride - 1) / stride);
  long long low = below >= 0 ? (below + stride - 1) / stride : -(-below / stride);
  if (low < first) low = first;
  if (high > last) high = last;
  for (long long r = low; r <= high; ++r)
    if (meet(a, next_i, b, next_j, shift + r * stride, budget)) return 1;
  return 0;
}

int qk_overlap(const qk_view* a, const qk_view* b) {
  if (qk_view_count(a) == 0 || qk_view_count(b) == 0) return 0;
  lattice la, lb;
  lattice_of(a, &la);
  lattice_of(b, &lb);
  int budget = 1 << 14;
  return meet(&la, 0, &lb, 0, lb.low - la.low, &budget);
}
