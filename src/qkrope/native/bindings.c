// bindings.c: the functions Python calls, on the tvm-ffi C ABI.
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/extra/c_env_api.h>

#include "bindings.h"
#include "cpu_api.h"
#include "plan.h"
#include "repeat.h"

static const char* type_name(int type_index) {
  switch (type_index) {
    case kTVMFFIBool:
      return "a bool";
    case kTVMFFIInt:
      return "an int";
    case kTVMFFIFloat:
      return "a float";
    case kTVMFFIRawStr:
    case kTVMFFISmallStr:
    case kTVMFFIStr:
      return "a str";
    case kTVMFFIArray:
      return "a list or tuple";
    case kTVMFFIMap:
      return "a dict";
    default:
      return "something else";
  }
}

static int tensor_arg(const char* name, const TVMFFIAny* arg, const DLTensor** out) {
  switch (arg->type_index) {
    case kTVMFFINone:
      *out = 0;
      return 0;
    case kTVMFFIDLTensorPtr:
      *out = (const DLTensor*)arg->v_ptr;
      return 0;
    case kTVMFFITensor:
      *out = (const DLTensor*)((const char*)arg->v_obj + sizeof(TVMFFIObject));
      return 0;
    default:
      return qk_raise("TypeError", "%s: expected a tensor or None, got %s", name,
                      type_name(arg->type_index));
  }
}

static const char* text_arg(const TVMFFIAny* arg) {
  if (arg->type_index == kTVMFFIRawStr) return arg->v_c_str;
  if (arg->type_index == kTVMFFISmallStr) return arg->v_bytes;
  if (arg->type_index == kTVMFFIStr)
    return ((const TVMFFIByteArray*)((const char*)arg->v_obj + sizeof(TVMFFIObject)))->data;
  return "";
}

static int return_text(TVMFFIAny* result, const char* text) {
  TVMFFIByteArray bytes = {text, strlen(text)};
  return TVMFFIStringFromByteArray(&bytes, result);
}

static void* copy_of(const TVMFFIAny* address, size_t bytes) {
  void* copy = malloc(bytes ? bytes : 1);
  if (copy && bytes) memcpy(copy, (const void*)(uintptr_t)address->v_int64, bytes);
  return copy;
}

// plan_new(addresses of int32[10 + 3 * 7], float[13], qk_frac[rotary_dim / 2] and
//          qk_pair[rotary_dim / 2]) -> plan
// int32: nq, nk, has_v, head_dim, rotary_dim, pairing, rope_first, reverse, axes, general, then the
// qk_side_variant of q, k and v. float: attention_factor, then the qk_norm_numbers of q, k and v.
FUNCTION(plan_new) {
  (void)self;
  if (n != 4) return qk_raise("TypeError", "plan_new: expected 4 arguments, got %d", n);
  qk_plan* plan = (qk_plan*)calloc(1, sizeof *plan);
  if (!plan) return qk_raise("MemoryError", "plan_new: out of memory");
  const int* ints = (const int*)(uintptr_t)args[0].v_int64;
  const float* floats = (const float*)(uintptr_t)args[1].v_int64;
  qk_variant* v = &plan->variant;
  int* to[] = {&plan->num_q_heads, &plan->num_kv_heads, &plan->has_v, &v->head_dim, &v->rotary_dim,
               &v->pairing,        &v->rope_first,      &v->reverse,  &v->axes,     &v->general};
  qk_side_variant* sides[] = {&v->q, &v->k, &v->v};
  qk_norm_numbers* numbers[] = {&plan->q, &plan->k, &plan->v};
  for (int i = 0; i < 10; ++i) *to[i] = *ints++;
  plan->attention_factor = *floats++;
  for (int i = 0; i < 3; ++i, ints += 7, floats += 4) {
    memcpy(sides[i], ints, sizeof *sides[i]);
    memcpy(numbers[i], floats, sizeof *numbers[i]);
  }
  plan->num_frac = v->rotary_dim / 2;
  plan->frac = (qk_frac*)copy_of(&args[2], plan->num_frac * sizeof(qk_frac));
  plan->pairs = (qk_pair*)copy_of(&args[3], plan->num_frac * sizeof(qk_pair));
  if (!plan->frac || !plan->pairs) return qk_raise("MemoryError", "plan_new: out of memory");
  return return_int(result, (int64_t)(uintptr_t)plan);
}
_Static_assert(sizeof(qk_side_variant) == 7 * sizeof(int), "as plan.py writes it");
_Static_assert(sizeof(qk_norm_numbers) == 4 * sizeof(float), "as plan.py writes it");
_Static_assert(sizeof(qk_pair) == 7 * sizeof(short), "as plan.py writes it");

static int run_cpu(qk_checked* checked, int backward) {
  qk_frac fracs[QK_MAX_HEAD_DIM / 2];
  const char* error = qk_cpu_isa() ? 0 : qk_cpu_select_isa("");
  if (error) return qk_raise("ValueError", "%s", error);
  if (checked->variant.angle == QK_ANGLE_INV_FREQ) checked->variant.angle = QK_ANGLE_PHASE;
  for (int i = 0; i < checked->num_parts; ++i) {
    qk_params* p = &checked->part[i];
    if (!p->tokens) continue;
    if (p->inv_freq) {
      qk_fracs_of_inv_freq(p->inv_freq, p->inv_freq_dtype == QK_F64, p->inv_freq_step,
                           checked->variant.reverse, checked->variant.rotary_dim / 2, fracs);
      p->frac = fracs;
    }
    if (backward ? qk_cpu_backward(&checked->variant, p, &checked->grads[i])
                 : qk_cpu_run(&checked->variant, p))
      return qk_raise("RuntimeError", "the CPU kernel refused a checked call (a bug in qkrope)");
  }
  return 0;
}

// A tensor, or a number, or None for 1.
static int scale_arg(const char* name, const TVMFFIAny* arg, const DLTensor** out, float* scale) {
  *scale = 1.0f;
  if (arg->type_index == kTVMFFIFloat || arg->type_index == kTVMFFIInt) {
    double value = arg->type_index == kTVMFFIFloat ? arg->v_float64 : (double)arg->v_int64;
    *scale = (float)value;
    if (*scale - *scale == 0.0f) return 0;
    return qk_raise("ValueError", "%s: expected a finite number that float32 can hold, got %g",
                    name, value);
  }
  if (arg->type_index == kTVMFFINone || arg->type_index == kTVMFFIDLTensorPtr ||
      arg->type_index == kTVMFFITensor)
    return tensor_arg(name, arg, out);
  return qk_raise("TypeError", "%s: expected a number, a tensor or None, got %s", name,
                  type_name(arg->type_index));
}

// qk_norm_rope(plan, flags, qkv, q, k, q_weight, k_weight, positions
//              [, k_positions, cos, sin, cos_sin_cache, inv_freq, q_out, k_out
//               [, q_bias, k_bias, k_cos, k_sin, v, v_weight, v_out, q_scale, k_scale,
//                rotate_from, rotate_to]]) -> the answer of qk_cuda_run.
// flags: 1 = nothing on this stream can have written the weights; 2 = check and do nothing.
// rotate_to: -1 = to the end.
enum { PLAIN = 8, ANGLES = 15, ALL = 26, TENSORS = 22 };  // arguments of qk_norm_rope

static int read_call(const TVMFFIAny* args, int n, qk_call* to) {
  static const char* names[] = {
      "qkv",          "q",      "k",      "q_weight",      "k_weight", "positions",
      "positions[1]", "cos",    "sin",    "cos_sin_cache", "inv_freq", "out[0]",
      "out[1]",       "q_bias", "k_bias", "k cos",         "k sin",    "v",
      "v_weight",     "out[2]"};
  memset(to, 0, sizeof *to);
  const DLTensor** slots[] = {
      &to->qkv,         &to->q,           &to->k,     &to->q_weight, &to->k_weight,
      &to->q_positions, &to->k_positions, &to->cos,   &to->sin,      &to->cos_sin_cache,
      &to->inv_freq,    &to->q_out,       &to->k_out, &to->q_bias,   &to->k_bias,
      &to->k_cos,       &to->k_sin,       &to->v,     &to->v_weight, &to->v_out};
  if ((n < PLAIN || n > ANGLES) && n != ALL)
    return qk_raise("TypeError", "qk_norm_rope: got %d arguments", n);
  to->plan = (const qk_plan*)(uintptr_t)args[0].v_int64;
  to->early_weights = args[1].v_int64 & 1;
  for (int i = 2; i < n && i < TENSORS; ++i)
    if (tensor_arg(names[i - 2], &args[i], slots[i - 2])) return -1;
  to->q_scale = to->k_scale = 1.0f;
  to->rotate_to = -1;
  if (n == ALL) {
    const TVMFFIAny* rest = args + TENSORS;
    if (scale_arg("q_scale", &rest[0], &to->q_scale_of, &to->q_scale) ||
        scale_arg("k_scale", &rest[1], &to->k_scale_of, &to->k_scale))
      return -1;
    to->rotate_from = rest[2].v_int64;
    to->rotate_to = rest[3].v_int64;
  }
  return 0;
}

FUNCTION(qk_norm_rope) {
  (void)self;
  qk_call call;
  if (read_call(args, n, &call)) return -1;
  const int check_only = args[1].v_int64 & 2;
  qk_description description;
  description.count = 0;
  if (n == PLAIN && !check_only) {
    qk_describe(&call, &description);
    const qk_ready* again = qk_repeated(&description, &call);
    if (again) {
      const DLDevice device = call.qkv->device;
      void* stream = TVMFFIEnvGetStream(device.device_type, device.device_id);
      if (qk_cuda_again(again, device.device_id, stream)) return -1;
      return return_int(result, 0);
    }
  }
  qk_checked checked;
  if (qk_check(&call, &checked)) return -1;
  if (check_only) return return_int(result, 0);
  long long answer = 0;
  if (checked.device_type == kDLCPU) {
    if (run_cpu(&checked, 0)) return -1;
  } else {
    qk_ready ready;
    void* stream = TVMFFIEnvGetStream(checked.device_type, checked.device_id);
    if (qk_cuda_run(call.plan, &checked, stream, &answer, &ready)) return -1;
    if (description.count && !answer && ready.function) qk_keep(&description, &call, &ready);
  }
  return return_int(result, answer);
}

// qk_norm_rope_backward(plan, flags, all operands of qk_norm_rope, then dq_out, dk_out, dv_out,
//                       dq_weight, dk_weight, dv_weight, dq_bias, dk_bias, workspace)
// -> the answer of qk_launch_backward. q_out, k_out and v_out are where the gradients of q, k and v
// go; the sums (dq_weight to dk_bias) are float32 or, where not wanted, None. The sums of a side
// without tokens are not written.
enum { GRADIENTS = 9, CHECK_ONLY = 2 };

int qk_read_backward(const TVMFFIAny* args, int n, qk_call* to) {
  static const char* names[] = {"dq_out",    "dk_out",  "dv_out",  "dq_weight", "dk_weight",
                                "dv_weight", "dq_bias", "dk_bias", "workspace"};
  if (n != ALL + GRADIENTS)
    return qk_raise("TypeError", "qk_norm_rope_backward: expected %d arguments, got %d",
                    ALL + GRADIENTS, n);
  if (read_call(args, ALL, to)) return -1;
  const DLTensor** slots[] = {&to->q_dy,      &to->k_dy,      &to->v_dy,
                              &to->q_dweight, &to->k_dweight, &to->v_dweight,
                              &to->q_dbias,   &to->k_dbias,   &to->workspace};
  for (int i = 0; i < GRADIENTS; ++i)
    if (tensor_arg(names[i], &args[ALL + i], slots[i])) return -1;
  if (to->qkv) return qk_raise("ValueError", "qkv: expected None in a backward, got a tensor");
  to->backward = 1;
  return 0;
}

FUNCTION(qk_norm_rope_backward) {
  (void)self;
  qk_call call;
  qk_checked checked;
  if (qk_read_backward(args, n, &call) || qk_check(&call, &checked)) return -1;
  long long answer = 0;
  if (args[1].v_int64 & CHECK_ONLY) return return_int(result, 0);
  if (checked.device_type == kDLCPU) {
    if (run_cpu(&checked, 1)) return -1;
  } else {
    void* stream = TVMFFIEnvGetStream(checked.device_type, checked.device_id);
    if (qk_launch_backward(call.plan, &checked, stream, &answer)) return -1;
  }
  return return_int(result, answer);
}

// backward_partials(plan, tokens, num_sms): rows of the workspace, num_sms 0 on a CPU. A row has as
// many floats as all sums together.
FUNCTION(backward_partials) {
  (void)self;
  if (n != 3) return qk_raise("TypeError", "backward_partials: expected 3 arguments, got %d", n);
  return return_int(result, qk_partials((const qk_plan*)(uintptr_t)args[0].v_int64, args[1].v_int64,
                                        (int)args[2].v_int64));
}

// cuda_load(device, address of a cubin) -> kernels
FUNCTION(cuda_load) {
  (void)self;
  if (n != 2) return qk_raise("TypeError", "cuda_load: expected 2 arguments, got %d", n);
  void* kernels = qk_cuda_load((int)args[0].v_int64, (const void*)(uintptr_t)args[1].v_int64);
  return kernels ? return_int(result, (int64_t)(uintptr_t)kernels) : -1;
}

// cuda_bind(plan, key, device, kernels)
FUNCTION(cuda_bind) {
  (void)self;
  if (n != 4) return qk_raise("TypeError", "cuda_bind: expected 4 arguments, got %d", n);
  if (qk_cuda_bind((qk_plan*)(uintptr_t)args[0].v_int64, args[1].v_int64, (int)args[2].v_int64,
                   (const qk_kernels*)(uintptr_t)args[3].v_int64))
    return -1;
  return return_int(result, 0);
}

// cuda_prepare(address, mask of kernels, num_sms, the arguments of qk_norm_rope): what a call on
// CUDA would launch, for tests that run the kernels without a GPU. Address 0 -> the key of its
// kernels; else one of these for each part that has tokens goes there -> how many.
typedef struct {
  qk_grid grid;
  union {
    qk_launch plain;
    qk_launch_general general;
  } launch;
} prepared;

FUNCTION(cuda_prepare) {
  (void)self;
  qk_call call;
  qk_checked checked;
  if (n < 3) return qk_raise("TypeError", "cuda_prepare: got %d arguments", n);
  if (read_call(args + 3, n - 3, &call)) return -1;
  call.as_cuda = 1;
  if (qk_check(&call, &checked)) return -1;
  prepared* to = (prepared*)(uintptr_t)args[0].v_int64;
  if (!to) return return_int(result, qk_slot_key(&checked));
  qk_kernels kernels = {.num_sms = (int)args[2].v_int64};
  for (int i = 0; i < QK_KERNELS; ++i)
    if (args[1].v_int64 >> i & 1) kernels.function[i] = to;  // any address but null
  long long count = 0, answer;
  for (int i = 0; i < checked.num_parts; ++i) {
    const qk_params* part = &checked.part[i];
    if (!part->tokens) continue;
    if (checked.general)
      qk_prepare_general(&kernels, part->frac, &checked, part, &to->launch.general, &to->grid,
                         &answer);
    else
      qk_prepare(&kernels, part->frac, &checked, part, &to->launch.plain, &to->grid, &answer);
    ++to, ++count;
  }
  return return_int(result, count);
}

FUNCTION(cuda_launch_bytes) {
  (void)self, (void)args, (void)n;
  return return_int(result, sizeof(qk_launch_general));
}
_Static_assert(sizeof(prepared) == 32 + sizeof(qk_launch_general), "as tests/emulated.py reads it");

// rows(tokens, q heads, k heads, head_dim, bytes an element, num_sms), block_warps(slots, walks,
// head_dim, rows, num_sms): the rules of the grid, for their tests.
FUNCTION(rows) {
  (void)self;
  if (n != 6) return qk_raise("TypeError", "rows: expected 6 arguments, got %d", n);
  return return_int(result,
                    qk_rows(args[0].v_int64, (int)args[1].v_int64, (int)args[2].v_int64,
                            (int)args[3].v_int64, (int)args[4].v_int64, (int)args[5].v_int64));
}

FUNCTION(block_warps) {
  (void)self;
  if (n != 5) return qk_raise("TypeError", "block_warps: expected 5 arguments, got %d", n);
  return return_int(result,
                    qk_block_warps((int)args[0].v_int64, args[1].v_int64, (int)args[2].v_int64,
                                   (int)args[3].v_int64, (int)args[4].v_int64));
}

// force_grid(rows, warps a block): overrides the rules while the bench tries alternatives; (0, 0)
// is the rules again.
FUNCTION(force_grid) {
  (void)self;
  if (n != 2) return qk_raise("TypeError", "force_grid: expected 2 arguments, got %d", n);
  qk_force_grid((int)args[0].v_int64, (int)args[1].v_int64);
  return return_int(result, 0);
}

// cpu_select_isa(name): "" picks the best, or what QKROPE_ISA names. -> the level now in use
FUNCTION(cpu_select_isa) {
  (void)self;
  const char* error = qk_cpu_select_isa(n > 0 ? text_arg(&args[0]) : "");
  if (error) return qk_raise("ValueError", "%s", error);
  return return_text(result, qk_cpu_isa());
}

FUNCTION(cpu_isa) {
  (void)self, (void)args, (void)n;
  const char* name = qk_cpu_isa();
  const char* error = name ? 0 : qk_cpu_select_isa("");
  if (error) return qk_raise("ValueError", "%s", error);
  return return_text(result, qk_cpu_isa());
}

FUNCTION(cpu_supported) {
  (void)self;
  return return_int(result, n > 0 && qk_cpu_supported(text_arg(&args[0])));
}
