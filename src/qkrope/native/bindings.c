// bindings.c: the functions Python calls, on the tvm-ffi C ABI.
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include "cpu_api.h"
#include "plan.h"

#define EXPORT __attribute__((visibility("default")))
#define FUNCTION(name) \
  EXPORT int __tvm_ffi_##name(void* self, const TVMFFIAny* args, int32_t n, TVMFFIAny* result)

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

static int return_int(TVMFFIAny* result, int64_t value) {
  memset(result, 0, sizeof *result);
  result->type_index = kTVMFFIInt;
  result->v_int64 = value;
  return 0;
}

static int return_text(TVMFFIAny* result, const char* text) {
  TVMFFIByteArray bytes = {text, strlen(text)};
  return TVMFFIStringFromByteArray(&bytes, result);
}

// plan_new(nq, nk, head_dim, rotary_dim, pairing, q_norm, k_norm, q_eps, q_offset, k_eps, k_offset,
//          attention_factor, address of int32[rotary_dim] = lo, hi, lo, hi, ...) -> plan
FUNCTION(plan_new) {
  (void)self;
  if (n != 13) return qk_raise("TypeError", "plan_new: expected 13 arguments, got %d", n);
  qk_plan* plan = (qk_plan*)calloc(1, sizeof *plan);
  if (!plan) return qk_raise("MemoryError", "plan_new: out of memory");
  plan->num_q_heads = (int)args[0].v_int64;
  plan->num_kv_heads = (int)args[1].v_int64;
  plan->variant.head_dim = (int)args[2].v_int64;
  plan->variant.rotary_dim = (int)args[3].v_int64;
  plan->variant.pairing = (int)args[4].v_int64;
  plan->variant.q_norm = (int)args[5].v_int64;
  plan->variant.k_norm = (int)args[6].v_int64;
  plan->q_eps = (float)args[7].v_float64;
  plan->q_offset = (float)args[8].v_float64;
  plan->k_eps = (float)args[9].v_float64;
  plan->k_offset = (float)args[10].v_float64;
  plan->attention_factor = (float)args[11].v_float64;
  plan->num_frac = plan->variant.rotary_dim / 2;
  size_t bytes = plan->num_frac * sizeof(qk_frac);
  plan->frac = (qk_frac*)malloc(bytes ? bytes : 1);
  if (!plan->frac) return qk_raise("MemoryError", "plan_new: out of memory");
  if (bytes) memcpy(plan->frac, (const void*)(uintptr_t)args[12].v_int64, bytes);
  return return_int(result, (int64_t)(uintptr_t)plan);
}

static int run_cpu(qk_checked* checked) {
  qk_frac fracs[QK_MAX_HEAD_DIM / 2];
  if (checked->variant.angle == QK_ANGLE_INV_FREQ) checked->variant.angle = QK_ANGLE_PHASE;
  for (int i = 0; i < checked->num_parts; ++i) {
    qk_params* p = &checked->part[i];
    if (!p->tokens) continue;
    if (p->inv_freq) {
      qk_fracs_of_inv_freq(p->inv_freq, p->inv_freq_dtype == QK_F64, p->inv_freq_step,
                           checked->variant.rotary_dim / 2, fracs);
      p->frac = fracs;
    }
    if (qk_cpu_run(&checked->variant, p))
      return qk_raise("RuntimeError", "the CPU kernel refused a checked call (a bug in qkrope)");
  }
  return 0;
}

// qk_norm_rope(plan, flags, qkv, q, k, q_weight, k_weight, positions
//              [, k_positions, cos, sin, cos_sin_cache, inv_freq, q_out, k_out]) -> the
// answer of qk_cuda_run. flags: 1 = nothing on this stream can have written the weights.
FUNCTION(qk_norm_rope) {
  (void)self;
  static const char* names[] = {
      "qkv",          "q",   "k",   "q_weight",      "k_weight", "positions",
      "positions[1]", "cos", "sin", "cos_sin_cache", "inv_freq", "out[0]",
      "out[1]"};
  qk_call call;
  memset(&call, 0, sizeof call);
  const DLTensor** slots[] = {
      &call.qkv,         &call.q,           &call.k,    &call.q_weight, &call.k_weight,
      &call.q_positions, &call.k_positions, &call.cos,  &call.sin,      &call.cos_sin_cache,
      &call.inv_freq,    &call.q_out,       &call.k_out};
  if (n < 8 || n > 15) return qk_raise("TypeError", "qk_norm_rope: got %d arguments", n);
  qk_plan* plan = (qk_plan*)(uintptr_t)args[0].v_int64;
  call.plan = plan;
  call.early_weights = args[1].v_int64 & 1;
  for (int i = 2; i < n; ++i)
    if (tensor_arg(names[i - 2], &args[i], slots[i - 2])) return -1;
  qk_checked checked;
  if (qk_check(&call, &checked)) return -1;
  long long answer = 0;
  if (checked.device_type == kDLCPU) {
    if (run_cpu(&checked)) return -1;
  } else {
    void* stream = TVMFFIEnvGetStream(checked.device_type, checked.device_id);
    if (qk_cuda_run(plan, &checked, stream, &answer)) return -1;
  }
  return return_int(result, answer);
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

// rows(tokens, q heads, k heads, groups, most, num_sms), block_warps(warps, num_sms): the rules of
// the grid, for their tests.
FUNCTION(rows) {
  (void)self;
  if (n != 6) return qk_raise("TypeError", "rows: expected 6 arguments, got %d", n);
  return return_int(result,
                    qk_rows(args[0].v_int64, (int)args[1].v_int64, (int)args[2].v_int64,
                            (int)args[3].v_int64, (int)args[4].v_int64, (int)args[5].v_int64));
}

FUNCTION(block_warps) {
  (void)self;
  if (n != 2) return qk_raise("TypeError", "block_warps: expected 2 arguments, got %d", n);
  return return_int(result, qk_block_warps(args[0].v_int64, (int)args[1].v_int64));
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
