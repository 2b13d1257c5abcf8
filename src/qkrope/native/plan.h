// plan.h: a Spec on the native side, and the tensors of one call before they are checked.
#ifndef QKROPE_PLAN_H
#define QKROPE_PLAN_H

#include <dlpack/dlpack.h>

#include "params.h"

#ifdef __cplusplus
extern "C" {
#endif

// One loaded cubin.
enum { QK_SCALAR = 3, QK_SUMS = 4, QK_KERNELS = 5 };
typedef struct {
  // CUfunction, null: none. Vector of 1, 2, 4 rows; scalar; sums of a backward's rows.
  void* function[QK_KERNELS];
  int num_sms, shared_bytes, reserved_bytes;
} qk_kernels;

// What a plan runs for one (dtypes, angle source, device), bound by Python after a compile.
typedef struct qk_slot {
  struct qk_slot* next;
  long long key;
  const qk_kernels* kernels;
  const qk_frac* frac;  // the plan's table on that device
} qk_slot;

// The numbers of a Norm, and of its rest.
typedef struct {
  float eps, offset, rest_eps, rest_offset;
} qk_norm_numbers;

// What a Spec fixes. Plans live as long as the process: captured graphs point at their tables.
typedef struct {
  int num_q_heads, num_kv_heads;
  int has_v;           // the Spec has a v_norm
  qk_variant variant;  // dtypes and angle are filled in by each call
  qk_norm_numbers q, k, v;
  float attention_factor;
  int num_frac;
  qk_frac* frac;
  qk_pair* pairs;  // as many as frac
  qk_slot* slots;
} qk_plan;

// Null means not given. qkv excludes q, k and v.
typedef struct {
  const qk_plan* plan;
  const DLTensor *qkv, *q, *k, *q_weight, *k_weight, *q_positions, *k_positions;
  const DLTensor *cos, *sin, *cos_sin_cache, *inv_freq, *q_out, *k_out;
  const DLTensor *q_bias, *k_bias, *q_scale_of, *k_scale_of, *k_cos, *k_sin;
  const DLTensor *v, *v_weight, *v_out;
  float q_scale, k_scale;
  long long rotate_from, rotate_to;  // rotate_to < 0: to the end
  int early_weights;
  int as_cuda;  // check as if the tensors were on CUDA: for the emulator of the tests
  // The gradients' call: q_out, k_out and v_out are where those of q, k and v go.
  int backward;
  const DLTensor *q_dy, *k_dy, *v_dy, *q_dweight, *k_dweight, *v_dweight, *q_dbias, *k_dbias;
  const DLTensor* workspace;
} qk_call;

// A call as the kernels see it: one part, or two where q and k walk different tokens or turn by
// tables of their own, and one more where v walks the tokens of neither.
typedef struct {
  qk_variant variant;
  qk_params part[3];
  int num_parts;
  int device_type, device_id;
  int general;        // CUDA: one of the parts is, or what the plain kernel does not run
  qk_grads grads[3];  // of each part, where the call is a backward; else undefined
} qk_checked;

// check.c. 0, or -1 with a TypeError or ValueError raised that names argument, got and expected.
// A backward's variant rounds once, whatever the Spec does: its casts count as the identity.
int qk_check(const qk_call* call, qk_checked* out);

// check_backward.c. Rows of partial sums through which the gradients of weights and biases of so
// many tokens are summed: one function for all who allocate or fill a workspace. num_sms 0: a CPU.
long long qk_partials(const qk_plan* plan, long long tokens, int num_sms);

// frac.cpp: n frequencies (float32 or float64, radians a position) as fractions of a turn, of the
// turn back where `reverse` is set.
void qk_fracs_of_inv_freq(const void* inv_freq, int is_double, long long step, int reverse, int n,
                          qk_frac* out);

// One launch: which of a cubin's functions, and its grid and block.
typedef struct {
  int function;
  unsigned grid[3], block[3], shared;
} qk_grid;

// A plain call's launch, whole.
typedef struct {
  void* function;
  qk_grid grid;
  qk_launch launch;
} qk_ready;

// launcher.c
// Warps a multiprocessor beside which as many of the next call fit.
#define QK_BESIDE 20
// *answer: > 0, nothing ran and these kernels are to be bound first; 0; or -1 (unaligned rows) or
// -2 (no aligned layout) the first time such a call took the slow kernel.
// Where the call is one plain launch of a vector kernel and `ready` is not null, it is copied
// there; else ready->function is null.
int qk_cuda_run(const qk_plan* plan, const qk_checked* call, void* stream, long long* answer,
                qk_ready* ready);
int qk_cuda_again(const qk_ready* ready, int device, void* stream);
long long qk_slot_key(const qk_checked* call);
qk_kernels* qk_cuda_load(int device, const void* cubin);
int qk_cuda_bind(qk_plan* plan, long long key, int device, const qk_kernels* kernels);
// launch_plain.c
void qk_force_grid(int rows, int warps);
int qk_grid_epoch(void);  // another number whenever the grid was forced or set free
int qk_rows(long long tokens, int q_heads, int k_heads, int head_dim, int size, int num_sms);
int qk_block_warps(int slots, long long walks, int head_dim, int rows, int num_sms);

// The launch of one part, laid out: launch_plain.c, and launch_general.c where qk_checked.general.
void qk_prepare(const qk_kernels* kernels, const qk_frac* frac, const qk_checked* call,
                const qk_params* part, qk_launch* launch, qk_grid* grid, long long* answer);
void qk_prepare_general(const qk_kernels* kernels, const qk_frac* frac, const qk_checked* call,
                        const qk_params* part, qk_launch_general* launch, qk_grid* grid,
                        long long* answer);
// launch_backward.c. As qk_cuda_run; a part without tokens writes nothing, no sums either.
int qk_launch_backward(const qk_plan* plan, const qk_checked* call, void* stream,
                       long long* answer);
long long qk_cuda_partials(const qk_plan* plan, long long tokens, int num_sms);
// What the two share.
void qk_fill_launch(const qk_params* part, int item, const qk_frac* frac, qk_launch* launch);
int qk_choose_kernel(const qk_kernels* kernels, int aligned, int q_heads, int k_heads,
                     long long tokens, int head_dim, int size, int* rows, long long* answer);
int qk_shape_side(qk_launch_side* side, int rows, int head_dim);  // -> its slots in grid x
void qk_shape_grid(const qk_kernels* kernels, unsigned tokens, int slots, int rows, int head_dim,
                   qk_grid* grid);

// view.c
int qk_raise(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));

#ifdef __cplusplus
}
#endif
#endif
