// launch.h: what launcher.c and the files that lay out other launches share.
#ifndef QKROPE_LAUNCH_H
#define QKROPE_LAUNCH_H

#include "plan.h"

static inline int qk_slots_of(int heads, int a_slot) { return (heads + a_slot - 1) / a_slot; }

// Makes the device's primary context current where another is; *pushed says whether to pop.
int qk_enter(int device, int* pushed);
void qk_leave(int pushed);

// The kernels that a plan has for calls of a key; null: none yet.
const qk_slot* qk_find_slot(const qk_plan* plan, const qk_checked* c, long long key);

// Pointers and strides of a plain call, and those that make up `more`, allow the vector loads.
int qk_is_aligned(const qk_variant* v, const qk_launch* p, long long more);

// Of a general call: its launch without the grid, and whether rows, weights, biases and what makes
// up `more` may be read by vector loads.
void qk_fill_general(const qk_variant* v, const qk_params* p, const qk_frac* frac,
                     qk_launch_general* out);
int qk_is_aligned_general(const qk_variant* v, qk_launch_general* p, long long more);
int qk_is_row(const qk_side_variant* s);  // a norm of whole rows

// QK_SCALAR, announced the first time that a call takes it: for its rows, or for want of a layout.
int qk_scalar_kernel(int has_layout, long long* answer);

int qk_submit(void* function, const qk_grid* grid, const void* launch, void* stream);

#endif
