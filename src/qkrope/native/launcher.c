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
enum { PROGRAMMATIC_STREAM_SERIALIZATION = 6, MULTIPROCESSOR_COUNT = 16, NOT_FOUND = 500 };

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
static int enter(int device, int* pushed) {
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

static void leave(int pushed) {
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
  static const char* names[2] = {"qkrope_vector", "qkrope_scalar"};
  void *library, *kernel;
  TRY(DeviceGetAttribute(&kernels->num_sms, MULTIPROCESSOR_COUNT, device));
  TRY(LibraryLoadData(&library, cubin, 0, 0, 0, 0, 0, 0));
  for (int i = 0; i < 2; ++i) {
    CUresult code = cu.LibraryGetKernel(&kernel, library, names[i]);
    if (code == NOT_FOUND) continue;  // a variant without vector loads
    if (failed(code, "cuLibraryGetKernel")) return -1;
    TRY(KernelGetFunction(&kernels->function[i], kernel));
  }
  if (!kernels->function[1]) return qk_raise("RuntimeError", "cuda_load: a cubin that is not ours");
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
  TRY(StreamSynchronize(0));  // a copy from pageable memory may return before it has landed
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

// ---- the grid
// -------------------------------------------------------------------------------------

// Heads that a group of lanes serves, one after the other, of one side of one token. A small batch
// spreads over all multiprocessors, about six warps each; a large one gives each group as many
// heads as it can have in flight, so that an angle is computed once for all of them.
int qk_passes(int heads, int most, long long warps, int num_sms) {
  long long each = (warps + 6LL * num_sms - 1) / (6LL * num_sms);
  if (each > most) each = most;
  if (each > heads) each = heads;
  if (each < 1) each = 1;
  int slots = (int)((heads + each - 1) / each);
  return (heads + slots - 1) / slots;  // as even as it goes
}

// Warps a block. A grid that fits the device goes out in as many blocks as there are
// multiprocessors, or a multiple, so that each gets the same share; a large one in blocks of four.
int qk_block_warps(int most, long long warps, int num_sms) {
  const long long room = (long long)most * num_sms;
  const long long each = (warps + room - 1) / room;  // blocks a multiprocessor
  if (each > 3) return 4;
  return (int)((warps + each * num_sms - 1) / (each * num_sms));
}

static long long mix(long long bits, const qk_launch_side* s, const qk_launch* p, int side) {
  if (!s->heads) return bits;
  bits |= (long long)(uintptr_t)s->x | (long long)(uintptr_t)s->y;
  bits |= (long long)(uintptr_t)s->weight | s->x_head | s->y_head;
  for (int d = 0; d < p->ndim; ++d) bits |= p->x_dim[side][d] | p->y_dim[side][d];
  return bits;
}

// Pointers and strides of this call allow the variant's vector loads.
static int is_aligned(const qk_checked* c, const qk_launch* p) {
  const qk_variant* v = &c->variant;
  int eights = v->pairing == QK_HALF && v->dtype != QK_F32 && QK_LANE_UNITS(v->head_dim) == 1;
  long long bits = mix(mix(0, &p->side[0], p, 0), &p->side[1], p, 1);
  return !(bits & (eights ? 7 : 15));
}

static void launch_side(const qk_params* p, const qk_side* from, int item, int side,
                        qk_launch* out) {
  qk_launch_side* to = &out->side[side];
  to->heads = from->heads;
  if (!from->heads) return;
  to->x = (const char*)from->x;
  to->y = (char*)from->y;
  to->weight = from->weight;
  to->x_head = from->x_head * item;
  to->y_head = from->y_head * item;
  to->eps = from->eps;
  to->weight_offset = from->weight_offset;
  for (int d = 0; d < p->ndim; ++d) {
    out->x_dim[side][d] = from->x_dim[d] * item;
    out->y_dim[side][d] = from->y_dim[d] * item;
  }
  to->x_token = out->x_dim[side][0];
  to->y_token = out->y_dim[side][0];
}

static void fill_launch(const qk_params* p, int item, const qk_frac* frac, qk_launch* out) {
  memset(out, 0, sizeof *out);
  launch_side(p, &p->q, item, 0, out);
  launch_side(p, &p->k, item, 1, out);
  out->pos = (const char*)p->pos;
  out->frac = frac;
  out->tokens = (unsigned)p->tokens;
  out->attention_factor = p->attention_factor;
  out->pos_wide = p->pos_wide;
  out->early_weights = p->early_weights;
  out->ndim = p->ndim;
  for (int d = 0; d < p->ndim; ++d) {
    out->size[d] = (unsigned)p->size[d];
    out->pos_dim[d] = p->pos_dim[d] * (p->pos_wide ? 8 : 4);
    out->cos_dim[d] = p->cos_dim[d];
    out->sin_dim[d] = p->sin_dim[d];
  }
  out->pos_token = out->pos_dim[0];
  out->inv_freq = p->inv_freq;
  out->inv_freq_step = p->inv_freq_step;
  out->inv_freq_dtype = p->inv_freq_dtype;
  out->table_dtype = p->table_dtype;
  out->table_full = p->table_full;
  out->table_rows = p->table_rows;
  out->cos = (const char*)p->cos;
  out->sin = (const char*)p->sin;
  out->cos_step = p->cos_step, out->sin_step = p->sin_step;
  out->cos_row = p->cos_row, out->sin_row = p->sin_row;
}

// For the bench that justifies the rule above: passes (0: by the rule), warps a block (0), groups
// on tokens (-1).
static int forced_passes, forced_warps, forced_on_tokens = -1;

void qk_force_grid(int passes, int warps, int on_tokens) {
  forced_passes = passes, forced_warps = warps, forced_on_tokens = on_tokens;
}

static int launch(const qk_slot* slot, const qk_checked* c, const qk_params* params, void* stream,
                  long long* answer) {
  const qk_variant* v = &c->variant;
  const int groups = QK_GROUPS(v->head_dim);
  const int most = QK_PASSES(v->head_dim), num_sms = slot->kernels->num_sms;
  int slots = 0;
  qk_launch p;
  if (params->tokens > INT32_MAX)
    return qk_raise("ValueError", "q, k: got %lld tokens, expected at most 2^31 - 1",
                    params->tokens);
  fill_launch(params, c->variant.dtype == QK_F32 ? 4 : 2, slot->frac, &p);
  void* function = slot->kernels->function[0];
  if (!function || !is_aligned(c, &p)) {
    static int said[2];  // a slow path announces itself, once
    int why = function ? 0 : 1;
    if (!said[why]) *answer = -1 - why;
    said[why] = 1;
    function = slot->kernels->function[1];
  }
  // Warps if each group served one head.
  const long long items = params->tokens * (p.side[0].heads + p.side[1].heads) / groups;
  p.groups_on_tokens = forced_on_tokens >= 0 ? forced_on_tokens : items > 16LL * num_sms;
  int heads_a_slot = p.groups_on_tokens ? 1 : groups;
  for (int i = 0; i < 2; ++i) {
    int heads = p.side[i].heads;
    if (!heads) continue;
    int each = qk_passes(heads, most, items, num_sms);
    if (forced_passes) each = forced_passes < heads ? forced_passes : heads;
    if (each > most) each = most;
    p.side[i].passes = each;
    slots += (heads + each * heads_a_slot - 1) / (each * heads_a_slot);
    if (!i) p.q_slots = slots;
  }
  p.slots = slots;
  while (1u << p.slots_shift < p.slots) ++p.slots_shift;
  p.slots_reciprocal = (unsigned)(((1ULL << (31 + p.slots_shift)) + p.slots - 1) / p.slots);
  unsigned tokens_a_warp = p.groups_on_tokens ? groups : 1;
  const long long warps = (long long)((p.tokens + tokens_a_warp - 1) / tokens_a_warp) * slots;
  if (warps > INT32_MAX)
    return qk_raise("ValueError", "q, k: got %lld warps of heads, expected at most 2^31 - 1",
                    warps);
  const int block =
      forced_warps ? forced_warps : qk_block_warps(QK_BLOCK_WARPS(v->head_dim), warps, num_sms);
  launch_attribute attribute;
  memset(&attribute, 0, sizeof attribute);
  attribute.id = PROGRAMMATIC_STREAM_SERIALIZATION;
  attribute.value.flag = 1;
  launch_config config;
  memset(&config, 0, sizeof config);
  config.grid[0] = (unsigned)((warps + block - 1) / block);
  config.grid[1] = config.grid[2] = 1;
  config.block[0] = 32;
  config.block[1] = block;
  config.block[2] = 1;
  config.stream = stream;
  config.attributes = &attribute;
  config.num_attributes = 1;
  void* arguments[] = {&p};
  TRY(LaunchKernelEx(&config, function, arguments, 0));
  return 0;
}

int qk_cuda_run(const qk_plan* plan, const qk_checked* c, void* stream, long long* answer) {
  long long key = qk_slot_key(c);
  const qk_slot* slot = find_slot(plan, c, key);
  if (!slot) {
    *answer = key;
    return 0;
  }
  int pushed, status = 0;
  if (enter(c->device_id, &pushed)) return -1;
  for (int i = 0; i < c->num_parts && !status; ++i) {
    if (c->part[i].tokens) status = launch(slot, c, &c->part[i], stream, answer);
  }
  leave(pushed);
  return status;
}
