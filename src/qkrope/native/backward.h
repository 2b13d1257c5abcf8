// backward.h: the gradients of a call laid out for a launch on CUDA, beside the structs of
// params.h. Plain C, for the launcher and for NVRTC.
#ifndef QKROPE_BACKWARD_H
#define QKROPE_BACKWARD_H

#include "params.h"

// Warps that a multiprocessor holds, and so the registers that a thread has. A tight variant:
// 16-bit types, a power of two of lanes, no norm for one side alone, all channels turning or none,
// by the Spec's frequencies or a table.
#define QK_BACKWARD_WARPS(head_dim, tight) \
  (QK_LANE_UNITS(head_dim) == 4 ? 8 : QK_LANE_UNITS(head_dim) == 1 && (tight) ? 20 : 16)
#define QK_BACKWARD_ROWS(head_dim) (QK_LANE_UNITS(head_dim) == 1 ? 2 : 1)  // heads of a unit

#define QK_SUM_WARPS 8          // of a block, at most
#define QK_GENERAL_SUM_WARPS 4  // of one of the general kernel, but for a norm of whole rows
#define QK_SUM_THREADS 256      // of a block of the kernel that adds rows of partial sums
#define QK_SUM_COLUMNS 2        // that such a block adds
#define QK_MAX_SUMS 5           // weights of q, k and v, biases of q and k

// Strides are in bytes. A unit is the heads that a group of lanes serves at a time; a group goes
// from one unit of its side to the one that is (step_tokens, step_units) further, `steps` times.
typedef struct {
  const char* dy;
  long long dy_token, dy_head;
  float* parts;  // of dweight: a row for each block of this side; null: not wanted
  unsigned step_tokens;
  int step_units, units, steps;
} qk_backward_side;

// As qk_launch: y is where dx goes; blocks below q_slots serve q, the rest k.
typedef struct {
  qk_launch plain;
  qk_backward_side more[2];
  long long dy_dim[2][QK_MAX_DIMS];
  int prefetch;  // bits: 1 x, 2 dy of the first unit, into L2 before waiting for earlier kernels
} qk_launch_backward_plain;

// The general kernel: blocks of a side begin at first_block; `rows` of them share its tokens, team
// by team, for each of its slots of heads (a norm of whole rows has one). Heads a group of lanes
// holds at once, and warps that a multiprocessor does.
#define QK_BACKWARD_TEAM_ROWS(head_dim, angle, dtype) \
  (QK_LANE_UNITS(head_dim) == 1 && (angle) != QK_ANGLE_TABLE && (dtype) != QK_F32 ? 2 : 1)
#define QK_BACKWARD_TEAM_WARPS(head_dim) (QK_LANE_UNITS(head_dim) <= 2 ? 16 : 8)

typedef struct {
  const char* dy;
  long long dy_head;
  float *weight_parts, *bias_parts;  // null: not wanted
  long long weight_columns, bias_columns;
  int weight_each, bias_each;  // a sum for each head
  int teams, steps;
  unsigned first_block, rows;
} qk_backward_general_side;

typedef struct {
  qk_launch_general base;
  qk_backward_general_side grads[3];
  long long dy_dim[3][QK_MAX_DIMS];
} qk_launch_backward_general;

// Adds `rows` rows of so many columns.
typedef struct {
  const float* parts;
  float* to;
  long long columns;
  int rows;
} qk_sum;

typedef struct {
  qk_sum sum[QK_MAX_SUMS];  // by y of the grid
} qk_launch_sums;

// One of the launches of a backward, in their order.
#ifndef __CUDACC__
#include "plan.h"

typedef struct {
  qk_grid grid;
  union {
    qk_launch_backward_plain plain;
    qk_launch_backward_general general;
    qk_launch_sums sums;
  } launch;
} qk_backward_step;
enum { QK_BACKWARD_STEPS = 2 };  // of a part, at most

// launch_backward.c: the launches of a part -> how many, or -1 with an error raised.
int qk_prepare_backward(const qk_kernels* kernels, const qk_frac* frac, const qk_checked* call,
                        int part, qk_backward_step* to, long long* answer);
long long qk_backward_key(const qk_checked* call);
// For the bench that justifies the rules: warps a block (4 or 8) and a multiprocessor; 0 is the
// rule. prefetch: as in the launch, -1 is the rule.
void qk_force_backward(int block, int warps, int prefetch);
#endif

#endif
