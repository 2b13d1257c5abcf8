// view.h: a strided view of memory, and the questions the boundary asks of two of them.
#ifndef QKROPE_VIEW_H
#define QKROPE_VIEW_H

#include <dlpack/dlpack.h>

#define QK_RAW_DIMS 12  // of a tensor as given, before coalescing

typedef struct {
  const char* name;
  char* data;
  int item;  // bytes an element
  int ndim;
  long long size[QK_RAW_DIMS], stride[QK_RAW_DIMS];  // strides in elements
} qk_view;

int qk_view_of(const char* name, const DLTensor* tensor, qk_view* out);
long long qk_view_count(const qk_view* view);
// "[2, 3, 4]" into a buffer of the caller's.
const char* qk_shape_text(const long long* size, int ndim, char* buffer, int capacity);
// Elements of one view share memory with each other: an expanded or folded tensor. Never misses an
// overlap; an interleaved lattice that no slicing or permuting makes may be called one.
int qk_overlaps_itself(const qk_view* view);
// Some element of a shares memory with some element of b. Exact for views whose strides nest;
// a search that runs out of its budget answers yes.
int qk_overlap(const qk_view* a, const qk_view* b);
// Same memory, same shape, same strides wherever they matter.
int qk_same(const qk_view* a, const qk_view* b);

#endif
