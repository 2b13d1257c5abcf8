// launcher.c: loads cubins and launches them through the CUDA driver, whose entry points are found
// at run time: this library builds and loads on a machine without CUDA.
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "plan.h"

// ---- the few driver types we need, laid out as cuda.h has them ----------------------------------

typedef int CUresult;
typedef struct {
  int id;
  char pad[4];
  union {
    char bytes[64];
    int flag;
  } value;
} launch_attribute;
typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  launch_attribute* attributes;
  unsigned num_attributes;
} launch_config;
enum { PROGRAMMATIC_STREAM_SERIALIZATION = 6, MULTIPROCESSOR_COUNT = 16 };

static struct {
  CUresult (*GetErrorName)(CUresult, const char**);
  CUresult (*GetErrorString)(CUresult, const char**);
  CUresult (*CtxGetDevice)(int*);
  CUresult (*CtxPushCurrent_v2)(void*);
  CUresult (*CtxPopCurrent_v2)(void**);
  CUresult (*DevicePrimaryCtxRetain)(void**, int);
  CUresult (*DeviceGetAttribute)(int*, int, int);
  CUresult (*LibraryLoadData)(void**, const void*, void*, void*, unsigned, void*, void*, unsigned);
  CUresult (*LibraryGetKernel)(void**, void*, const char*);
  CUresult (*KernelGetFunction)(void**, void*);
  CUresult (*MemAlloc_v2)(uintptr_t*, size_t);
  CUresult (*MemcpyHtoD_v2)(uintptr_t, const void*, size_t);
  CUresult (*LaunchKernelEx)(const launch_config*, void*, void**, void**);
  int ready;
} cu;

static int driver(void) {
  if (cu.ready) return 0;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) return qk_raise("RuntimeError", "the CUDA driver did not load: %s", dlerror());
#define FIND(name)                                            \
  if (!(*(void**)&cu.name = dlsym(library, "cu" #name)))      \
    return qk_raise("RuntimeError", "the CUDA driver has no cu" #name "; expected driver >= 12.0");
  FIND(GetErrorName)
  FIND(GetErrorString)
  FIND(CtxGetDevice)
  FIND(CtxPushCurrent_v2)
  FIND(CtxPopCurrent_v2)
  FIND(DevicePrimaryCtxRetain)
  FIND(DeviceGetAttribute)
  FIND(LibraryLoadData)
  FIND(LibraryGetKernel)
  FIND(KernelGetFunction)
  FIND(MemAlloc_v2)
  FIND(MemcpyHtoD_v2)
  FIND(LaunchKernelEx)
#undef FIND
  cu.ready = 1;
  return 0;
}

static int failed(CUresult code, const char* call) {
  const char *name = "?", *text = "?";
  if (!code) return 0;
  cu.GetErrorName(code, &name);
  cu.GetErrorString(code, &text);
  return qk_raise("RuntimeError", "%s failed: %s (%s)", call, name, text);
}
#define TRY(call)                        \
  do {                                   \
    if (failed(cu.call, "cu" #call)) return -1; \
  } while (0)

// Makes the device's primary context current where another is; *pushed says whether to pop.
static int enter(int device, int* pushed) {
  int current = -1;
  *pushed = 0;
  if (cu.CtxGetDevice(&current) == 0 && current == device) return 0;
  void* context;
  TRY(DevicePrimaryCtxRetain(&context, device));
  TRY(CtxPushCurrent_v2(context));
  *pushed = 1;
  return 0;
}

static void leave(int pushed) {
  void* context;
  if (pushed) cu.CtxPopCurrent_v2(&context);
}

// ---- kernels of a plan ---------------------------------------------------------------------------

// Everything a cubin was compiled for that the plan does not fix, and the device it is loaded on.
// A weight that is not given fits any kernel; a key names it as if it had the activations' dtype.
enum { Q_WEIGHT_SHIFT = 4, K_WEIGHT_SHIFT = 8 };

long long qk_slot_key(const qk_checked* c) {
  const qk_variant* v = &c->variant;
  int q_weight = v->q_weight_dtype < 0 ? v->dtype : v->q_weight_dtype;
  int k_weight = v->k_weight_dtype < 0 ? v->dtype : v->k_weight_dtype;
  return 1 | (long long)v->dtype << 1 | (long long)q_weight << Q_WEIGHT_SHIFT |
         (long long)k_weight << K_WEIGHT_SHIFT | (long long)v->angle << 12 |
         (long long)c->device_id << 16;
}

static const qk_slot* find_slot(const qk_plan* plan, const qk_checked* c, long long key) {
  const qk_slot* slot = __atomic_load_n(&plan->slots, __ATOMIC_ACQUIRE);
  long long free_bits = 0;
  if (c->variant.q_weight_dtype < 0) free_bits |= 15LL << Q_WEIGHT_SHIFT;
  if (c->variant.k_weight_dtype < 0) free_bits |= 15LL << K_WEIGHT_SHIFT;
  while (slot && ((slot->key ^ key) & ~free_bits)) slot = slot->next;
  return slot;
}

static int load_kernels(qk_kernels* kernels, int device, const void* cubin) {
  static const char* names[3] = {"qkrope_wide", "qkrope_narrow", "qkrope_scalar"};
  void *library, *kernel;
  TRY(DeviceGetAttribute(&kernels->num_sms, MULTIPROCESSOR_COUNT, device));
  TRY(LibraryLoadData(&library, cubin, 0, 0, 0, 0, 0, 0));
  for (int i = 0; i < 3; ++i) {
    if (cu.LibraryGetKernel(&kernel, library, names[i])) continue;  // a layout it does not have
    TRY(KernelGetFunction(&kernels->function[i], kernel));
  }
  if (!kernels->function[2]) return qk_raise("RuntimeError", "cuda_load: a cubin that is not ours");
  return 0;
}

qk_kernels* qk_cuda_load(int device, const void* cubin) {
  int pushed, status;
  if (driver() || enter(device, &pushed)) return 0;
  qk_kernels* kernels = (qk_kernels*)calloc(1, sizeof *kernels);
  status = kernels ? load_kernels(kernels, device, cubin)
                   : qk_raise("MemoryError", "cuda_load: out of memory");
  leave(pushed);
  if (!status) return kernels;
  free(kernels);
  return 0;
}

static int upload_frac(const qk_plan* plan, qk_slot* slot) {
  uintptr_t table;
  if (!plan->num_frac) return 0;
  TRY(MemAlloc_v2(&table, plan->num_frac * sizeof(qk_frac)));
  TRY(MemcpyHtoD_v2(table, plan->frac, plan->num_frac * sizeof(qk_frac)));
  slot->frac = (const qk_frac*)table;
  return 0;
}

int qk_cuda_bind(qk_plan* plan, long long key, int device, const qk_kernels* kernels) {
  int pushed, status;
  if (driver() || enter(device, &pushed)) return -1;
  qk_slot* slot = (qk_slot*)calloc(1, sizeof *slot);
  status = slot ? upload_frac(plan, slot) : qk_raise("MemoryError", "cuda_bind: out of memory");
  leave(pushed);
  if (status) {
    free(slot);
    return -1;
  }
  slot->key = key;
  slot->kernels = kernels;
  slot->next = plan->slots;
  __atomic_store_n(&plan->slots, slot, __ATOMIC_RELEASE);
  return 0;
}

// ---- the grid -------------------------------------------------------------------------------------

// How many warps share a token's passes. One token spreads over all it can use; a large batch fills
// the machine with few passes a warp left, so that cos and sin are computed once for many heads.
int qk_warps_per_token(int passes, long long tokens, int num_sms) {
  const long long resident = 32LL * num_sms;  // warps that keep the memory system busy
  int warps = passes;
  while (warps > 1 && (passes + warps - 2) / (warps - 1) <= 10 && tokens * (warps - 1) >= 4 * resident)
    --warps;
  return warps;
}

static long long mix(long long bits, const qk_side* s, int item, int ndim) {
  if (!s->heads) return bits;
  bits |= (long long)(uintptr_t)s->x | (long long)(uintptr_t)s->y;
  bits |= s->x_head * item | s->y_head * item;
  for (int d = 0; d < ndim; ++d) bits |= s->x_dim[d] * item | s->y_dim[d] * item;
  return bits;
}

// 0 wide, 1 narrow, 2 scalar: the widest loads that the pointers and strides of this call allow.
static int layout(const qk_slot* slot, const qk_checked* c, const qk_params* p) {
  const qk_variant* v = &c->variant;
  int item = v->dtype == QK_F32 ? 4 : 2;
  int wide = 16, narrow = v->pairing == QK_INTERLEAVED || item == 4 ? 16 : 8;
  long long bits = mix(mix(0, &p->q, item, p->ndim), &p->k, item, p->ndim);
  long long weights = (long long)(uintptr_t)p->q.weight | (long long)(uintptr_t)p->k.weight;
  bits |= weights;
  if (slot->kernels->function[0] && !(bits & (wide - 1))) return 0;
  if (slot->kernels->function[1] && !(bits & (narrow - 1))) return 1;
  return 2;
}

static int launch(const qk_slot* slot, const qk_checked* c, qk_params* p, void* stream) {
  int which = layout(slot, c, p);
  int per_warp = QK_HEADS_PER_WARP(c->variant.head_dim, which == 0);
  int passes = (p->q.heads + per_warp - 1) / per_warp + (p->k.heads + per_warp - 1) / per_warp;
  int warps = qk_warps_per_token(passes, p->tokens, slot->kernels->num_sms);
  long long blocks = (p->tokens * warps + QK_BLOCK_WARPS - 1) / QK_BLOCK_WARPS;
  if (p->tokens > INT32_MAX || blocks > INT32_MAX)
    return qk_raise("ValueError", "q, k: %lld tokens are more than one launch can take", p->tokens);
  launch_attribute attribute;
  memset(&attribute, 0, sizeof attribute);
  attribute.id = PROGRAMMATIC_STREAM_SERIALIZATION;
  attribute.value.flag = 1;
  launch_config config;
  memset(&config, 0, sizeof config);
  config.grid[0] = (unsigned)blocks;
  config.grid[1] = config.grid[2] = config.block[1] = config.block[2] = 1;
  config.block[0] = 32 * QK_BLOCK_WARPS;
  config.stream = stream;
  config.attributes = &attribute;
  config.num_attributes = 1;
  void* arguments[] = {p, &warps};
  TRY(LaunchKernelEx(&config, slot->kernels->function[which], arguments, 0));
  return 0;
}

int qk_cuda_run(const qk_plan* plan, const qk_checked* c, void* stream, long long* missing) {
  long long key = qk_slot_key(c);
  const qk_slot* slot = find_slot(plan, c, key);
  if (!slot) {
    *missing = key;
    return 0;
  }
  int pushed, status = 0;
  if (enter(c->device_id, &pushed)) return -1;
  for (int i = 0; i < c->num_parts && !status; ++i) {
    qk_params p = c->part[i];
    if (!p.tokens) continue;
    p.frac = slot->frac;
    status = launch(slot, c, &p, stream);
  }
  leave(pushed);
  return status;
}
