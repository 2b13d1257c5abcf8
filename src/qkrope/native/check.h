// check.h: what the files of the boundary share.
#ifndef QKROPE_CHECK_H
#define QKROPE_CHECK_H

#include "plan.h"
#include "view.h"

typedef struct {
  qk_view q, k, q_out, k_out;  // [leading..., heads, head_dim]
  int device_type, device_id;
  const DLTensor* first;  // the tensor the others must agree with, and its name
  const char* first_name;
} operands;

const char* qk_dtype_name(DLDataType t);
int qk_dtype_of(DLDataType t);  // QK_F32 and so on, or -1

// Each returns 0, or -1 with an error raised that names the argument.
int qk_float_dtype(const char* name, const DLTensor* t, int* dtype);
int qk_on_device(const operands* o, const char* name, const DLTensor* t);

// check_angles.c: fill what the angles of one part come from; `stride` walks the leading
// dimensions.
int qk_check_positions(const operands* o, const char* name, const DLTensor* t, const qk_view* to,
                       int required, qk_params* p, long long* stride);
int qk_check_table(const operands* o, const char* name, const DLTensor* t, const qk_view* to,
                   int rotary, int dtype, qk_params* p, const void** data, long long* step,
                   long long* stride);
int qk_check_cache(const operands* o, const DLTensor* t, int rotary, int dtype, qk_params* p);
int qk_check_inv_freq(const operands* o, const DLTensor* t, int rotary, qk_params* p);

#endif
