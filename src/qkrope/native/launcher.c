// launcher.c: loads cubins and launches them through the CUDA driver, whose entry points are found
// at run time: this library builds and loads on a machine without CUDA.
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "launch.h"

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
enum { PROGRAMMATIC_STREAM_SERIALIZATION = 6, NOT_FOUND = 500 };
enum {  // attributes of a device, and of a function
  MULTIPROCESSOR_COUNT = 16,
  COMPUTE_CAPABILITY_MAJOR = 75,
  SHARED_A_MULTIPROCESSOR = 81,
  RESERVED_SHARED_A_BLOCK = 111,
  MAX_DYNAMIC_SHARED = 8
};

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
  CUresult (*FuncSetAttribute)(void*, int, int);
  CUresult (*MemAlloc_v2)(uintptr_t*, size_t);
  CUresult (*MemcpyHtoD_v2)(uintptr_t, const void*, size_t);
  CUresult (*StreamSynchronize)(void*);
  CUresult (*LaunchKernelEx)(const launch_config*, void*, void**, void**);
  int ready;
} cu;

static int driver(void) {
  if (cu.ready) return 0;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) return qk_raise("RuntimeError", "the CUDA driver did not load: %s", dlerror());
#define FIND(name)                                                    \
  if (!(*(void**)& cu.name = dlsym(library, "cu" #name)))             \
    return qk_raise("RuntimeError", "the CUDA driver has no cu" #name \
                                    "; expected driver >= "           \
                                    "12.0");
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
  FIND(FuncSetAttribute)
  FIND(MemAlloc_v2)
  FIND(MemcpyHtoD_v2)
  FIND(StreamSynchronize)
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
#define TRY(call)                               \
  do {                                          \
    if (failed(cu.call, "cu" #call)) return -1; \
  } while (0)

// Makes the device's primary context current where another is; *pushed says whether to pop.
int qk_enter(int device, int* pushed) {
  int current = -1;
  *pushed = 0;
  if (cu.CtxGetDevice(&current) == 0 && current == device) return 0;
  static void* retained[64];  // once a device, for the life of the process
  if (device < 0 || device >= 64)
    return qk_raise("ValueError", "device: got cuda:%d, expected one below cuda:64", device);
  if (!retained[device]) TRY(DevicePrimaryCtxRetain(&retained[device], device));
  TRY(CtxPushCurrent_v2(retained[device]));
  *pushed = 1;
  return 0;
}

void qk_leave(int pushed) {
  void* context;
  if (pushed) cu.CtxPopCurrent_v2(&context);
}

// ---- kernels of a plan -------------------------------------------------------------------------

// Everything a cubin was compiled for that the plan does not fix, and the device it is loaded on.
// A weight that is not given fits any kernel; a key names it as if it had the activations' dtype.
enum { Q_WEIGHT_SHIFT = 4, K_WEIGHT_SHIFT = 8 };

long long qk_slot_key(const qk_checked* c) {
  const qk_variant* v = &c->variant;
  int q_weight = v->q_weight_dtype < 0 ? v->dtype : v->q_weight_dtype;
  int k_weight = v->k_weight_dtype < 0 ? v->dtype : v->k_weight_dtype;
  if (c->general) q_weight = k_weight = v->dtype;  // its kernels read any
  return 1 | (long long)v->dtype << 1 | (long long)q_weight << Q_WEIGHT_SHIFT |
         (long long)k_weight << K_WEIGHT_SHIFT | (long long)v->angle << 12 |
         (long long)c->general << 15 | (long long)c->device_id << 16;
}

const qk_slot* qk_find_slot(const qk_plan* plan, const qk_checked* c, long long key) {
  const qk_slot* slot = __atomic_load_n(&plan->slots, __ATOMIC_ACQUIRE);
  long long free_bits = 0;
  if (c->variant.q_weight_dtype < 0) free_bits |= 15LL << Q_WEIGHT_SHIFT;
  if (c->variant.k_weight_dtype < 0) free_bits |= 15LL << K_WEIGHT_SHIFT;
  while (slot && ((slot->key ^ key) & ~free_bits)) slot = slot->next;
  return slot;
}

static int load_kernels(qk_kernels* kernels, int device, const void* cubin) {
  static const char* names[QK_KERNELS] = {"qkrope_vector1", "qkrope_vector2", "qkrope_vector4",
                                          "qkrope_scalar", "qkrope_sums"};
  void *library, *kernel;
  int major;
  TRY(DeviceGetAttribute(&kernels->num_sms, MULTIPROCESSOR_COUNT, device));
  TRY(DeviceGetAttribute(&major, COMPUTE_CAPABILITY_MAJOR, device));
  if (major >= 9)  // programmatic dependent launch: calls run beside each other
    TRY(DeviceGetAttribute(&kernels->shared_bytes, SHARED_A_MULTIPROCESSOR, device));
  TRY(DeviceGetAttribute(&kernels->reserved_bytes, RESERVED_SHARED_A_BLOCK, device));
  TRY(LibraryLoadData(&library, cubin, 0, 0, 0, 0, 0, 0));
  for (int i = 0; i < QK_KERNELS; ++i) {
    CUresult code = cu.LibraryGetKernel(&kernel, library, names[i]);
    if (code == NOT_FOUND) continue;  // a variant without vector loads, or without four rows
    if (failed(code, "cuLibraryGetKernel")) return -1;
    TRY(KernelGetFunction(&kernels->function[i], kernel));
    if (kernels->shared_bytes)
      TRY(FuncSetAttribute(kernels->function[i], MAX_DYNAMIC_SHARED, kernels->shared_bytes / 2));
  }
  if (!kernels->function[QK_SCALAR])
    return qk_raise("RuntimeError", "cuda_load: a cubin that is not ours");
  return 0;
}

qk_kernels* qk_cuda_load(int device, const void* cubin) {
  int pushed, status;
  if (driver() || qk_enter(device, &pushed)) return 0;
  qk_kernels* kernels = (qk_kernels*)calloc(1, sizeof *kernels);
  status = kernels ? load_kernels(kernels, device, cubin)
                   : qk_raise("MemoryError", "cuda_load: out of memory");
  qk_leave(pushed);
  if (!status) return kernels;
  free(kernels);
  return 0;
}

static int upload_frac(const qk_plan* plan, qk_slot* slot) {
  uintptr_t table;
  if (!plan->num_frac) return 0;
  TRY(MemAlloc_v2(&table, plan->num_frac * sizeof(qk_frac)));
  TRY(MemcpyHtoD_v2(table, plan->frac, plan->num_frac * sizeof(qk_frac)));
  TRY(StreamSynchronize(0));  // a copy from pageable memory may return before it has landed
  slot->frac = (const qk_frac*)table;
  return 0;
}

int qk_cuda_bind(qk_plan* plan, long long key, int device, const qk_kernels* kernels) {
  int pushed, status;
  if (driver() || qk_enter(device, &pushed)) return -1;
  qk_slot* slot = (qk_slot*)calloc(1, sizeof *slot);
  status = slot ? upload_frac(plan, slot) : qk_raise("MemoryError", "cuda_bind: out of memory");
  qk_leave(pushed);
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

// ---- launches ----------------------------------------------------------------------------------

int qk_submit(void* function, const qk_grid* grid, const void* launch, void* stream) {
  launch_attribute attribute;
  memset(&attribute, 0, sizeof attribute);
  attribute.id = PROGRAMMATIC_STREAM_SERIALIZATION;
  attribute.value.flag = 1;
  launch_config config;
  memset(&config, 0, sizeof config);
  memcpy(config.grid, grid->grid, sizeof config.grid);
  memcpy(config.block, grid->block, sizeof config.block);
  config.shared_bytes = grid->shared;
  config.stream = stream;
  config.attributes = &attribute;
  config.num_attributes = 1;
  void* arguments[] = {(void*)launch};
  TRY(LaunchKernelEx(&config, function, arguments, 0));
  return 0;
}

static int launch(const qk_slot* slot, const qk_checked* c, const qk_params* params, void* stream,
                  long long* answer, qk_ready* ready) {
  if (params->tokens > INT32_MAX)
    return qk_raise("ValueError", "q, k: got %lld tokens, expected at most 2^31 - 1",
                    params->tokens);
  const qk_kernels* kernels = slot->kernels;
  if (c->general) {
    qk_launch_general p;
    qk_grid grid;
    qk_prepare_general(kernels, slot->frac, c, params, &p, &grid, answer);
    return qk_submit(kernels->function[grid.function], &grid, &p, stream);
  }
  qk_ready here, *to = ready ? ready : &here;
  qk_prepare(kernels, slot->frac, c, params, &to->launch, &to->grid, answer);
  to->function = kernels->function[to->grid.function];
  if (qk_submit(to->function, &to->grid, &to->launch, stream)) return -1;
  if (to->grid.function == QK_SCALAR) to->function = 0;
  return 0;
}

int qk_cuda_run(const qk_plan* plan, const qk_checked* c, void* stream, long long* answer,
                qk_ready* ready) {
  long long key = qk_slot_key(c);
  const qk_slot* slot = qk_find_slot(plan, c, key);
  if (ready) ready->function = 0;
  if (!slot) {
    *answer = key;
    return 0;
  }
  int pushed, status = 0;
  if (qk_enter(c->device_id, &pushed)) return -1;
  for (int i = 0; i < c->num_parts && !status; ++i)
    if (c->part[i].tokens)
      status = launch(slot, c, &c->part[i], stream, answer, c->num_parts == 1 ? ready : 0);
  qk_leave(pushed);
  return status;
}

int qk_cuda_again(const qk_ready* ready, int device, void* stream) {
  int pushed;
  if (qk_enter(device, &pushed)) return -1;
  int status = qk_submit(ready->function, &ready->grid, &ready->launch, stream);
  qk_leave(pushed);
  return status;
}
