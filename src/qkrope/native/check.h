// check.h: what the files of the boundary share.
#ifndef QKROPE_CHECK_H
#define QKROPE_CHECK_H

#include "plan.h"
#include "view.h"

enum { Q, K, V, SIDES };

typedef struct {
  int has[SIDES];
  qk_view in[SIDES], out[SIDES];  // [leading..., heads, head_dim]
  int device_type, device_id;
  const DLTensor* first;  // the tensor the others must agree with, and its name
  const char* first_name;
} operands;

const char* qk_dtype_name(DLDataType t);
int qk_dtype_of(DLDataType t);  // QK_F32 and so on, or -1

// Each returns 0, or -1 with an error raised that names the argument.
int qk_float_dtype(const char* name, const DLTensor* t, int* dtype);
int qk_like_dtype(const operands* o, const char* name, const DLTensor* t, int dtype, int* out);
int qk_on_device(const operands* o, const char* name, const DLTensor* t);

// check_sides.c: q, k and v, where they go, and what belongs to one of them.
int qk_check_sides(const qk_call* c, operands* o, int* dtype);
int qk_check_side(const qk_call* c, const operands* o, int side, qk_variant* v, qk_side* to);
int qk_check_scale(const qk_call* c, const operands* o, int side, int dtype, qk_side* to,
                   long long* stride);
int qk_check_memory(const qk_call* c, const operands* o);

// check_backward.c: the gradient of one side's output, with its strides along the leading
// dimensions, and the sums that go with it; then the workspace.
int qk_check_gradient(const qk_call* c, const operands* o, int side, int dtype, qk_side_grads* to,
                      long long* stride);
int qk_check_workspace(const qk_call* c, const operands* o, qk_checked* out);

// check_angles.c: all that the angles of one part come from. `lead` is the first of its sides;
// pos, cos and sin get their strides along the leading dimensions.
int qk_check_angles(const qk_call* c, const operands* o, const int* sides, const qk_view* lead,
                    int dtype, qk_params* p, long long* pos, long long* cos, long long* sin);

#endif
