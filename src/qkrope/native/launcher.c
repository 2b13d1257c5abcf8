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
  if (c->general) q_weight = k_weight = v->dtype;  // its kernels read any
  return 1 | (long long)v->dtype << 1 | (long long)q_weight << Q_WEIGHT_SHIFT |
         (long long)k_weight << K_WEIGHT_SHIFT | (long long)v->angle << 12 |
         (long long)c->general << 15 | (long long)c->device_id << 16;
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
  static const char* names[QK_KERNELS] = {"qkrope_vector1", "qkrope_vector2", "qkrope_vector4",
                                          "qkrope_scalar"};
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

// ---- the grid ----------------------------------------------------------------------------------

static int slots_of(int heads, int a_slot) { return (heads + a_slot - 1) / a_slot; }

// Heads of one token that a group of lanes serves: 1, 2 or 4, at most QK_PASSES.
// A small call: one while that leaves at most 8 warps a multiprocessor, then the fewest that leave
// at most 20. More warps would not fit beside those of the next call, fewer would not cover each
// other's latencies; and the more heads, the fewer times an angle is computed.
// A large one: as many as make 32 bytes a lane in flight, which is where registers still allow 40
// warps; but the most where groups cannot share a token's heads out evenly, and where rows are no
// whole cache lines, which neighbouring heads of a group then share.
int qk_rows(long long tokens, int q_heads, int k_heads, int head_dim, int size, int num_sms) {
  const int groups = QK_GROUPS(head_dim), most = QK_PASSES(head_dim);
  for (int rows = 1; rows < most; rows *= 2)
    if (tokens * (slots_of(q_heads, rows * groups) + slots_of(k_heads, rows * groups)) <=
        (rows == 1 && most > 2 ? 8LL : QK_BESIDE) * num_sms)
      return rows;
  const int lanes = QK_LANES(head_dim), best = size * QK_LANE_UNITS(head_dim) <= 2 ? 2 : 1;
  const int even = q_heads % (best * groups) == 0 && k_heads % (best * groups) == 0;
  return even && (lanes & (lanes - 1)) == 0 ? best : most;
}

// Warps a block, the slots of so many tokens shared out: what leaves the busiest multiprocessor the
// fewest warps, and of several such the most; at most 8, or 4 of the kernels that take more
// registers, where blocks of 8 would leave some unused.
int qk_block_warps(int slots, long long walks, int head_dim, int rows, int num_sms) {
  const int most = rows == 4 || QK_LANE_UNITS(head_dim) > 1 ? 4 : 8;
  const int even = slots_of(slots, slots_of(slots, most));
  if (slots * walks > (long long)QK_BESIDE * num_sms) return even;  // many blocks are even enough
  int best = even;
  long long least = INT64_MAX;
  for (int blocks = slots_of(slots, most); blocks <= slots; ++blocks) {
    const int warps = slots_of(slots, blocks);
    long long busiest = (blocks * walks + num_sms - 1) / num_sms * warps;
    if (busiest < 3) busiest = 3;  // fewer gain nothing
    if (busiest < least) least = busiest, best = warps;
  }
  return best;
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

void qk_fill_launch(const qk_params* p, int item, const qk_frac* frac, qk_launch* out) {
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

// For the bench that justifies the rules above: heads a group, warps a block; 0 is the rule.
static int forced_rows, forced_warps, epoch;

void qk_force_grid(int rows, int warps) { forced_rows = rows, forced_warps = warps, ++epoch; }
int qk_grid_epoch(void) { return epoch; }

int qk_choose_kernel(const qk_kernels* kernels, int aligned, int q_heads, int k_heads,
                     long long tokens, int head_dim, int size, int* rows, long long* answer) {
  void* const* functions = kernels->function;
  if (functions[0] && aligned) {
    *rows = forced_rows ? forced_rows
                        : qk_rows(tokens, q_heads, k_heads, head_dim, size, kernels->num_sms);
    return *rows == 4 ? 2 : *rows - 1;
  }
  static int said[2];  // a slow path announces itself, once
  int why = functions[0] ? 0 : 1;
  if (!said[why]) *answer = -1 - why;
  said[why] = 1;
  *rows = QK_PASSES(head_dim);
  return QK_SCALAR;
}

int qk_shape_side(qk_launch_side* side, int rows, int head_dim) {
  // Heads that a warp serves at a time.
  const int a_pass = QK_ON_TOKENS(head_dim, rows) ? 1 : QK_GROUPS(head_dim);
  const int needed = slots_of(side->heads, rows * a_pass);
  if (needed) side->passes = slots_of(side->heads, needed * a_pass);  // as even as it goes
  return needed;
}

// Shared memory that a block asks for and does not use: so much that this call and the next just
// fit on a multiprocessor. Launched one behind the other, small calls would else pile up there,
// five deep, and the blocks of the newest go where there is room: to a few of the multiprocessors.
static unsigned shared_of(const qk_kernels* kernels, long long blocks, unsigned warps) {
  const long long share = (blocks + kernels->num_sms - 1) / kernels->num_sms;
  if (share * warps > QK_BESIDE) return 0;
  const long long bytes = kernels->shared_bytes / (2 * share) - kernels->reserved_bytes;
  return bytes <= 0 ? 0 : (unsigned)(bytes & ~127LL);
}

void qk_shape_grid(const qk_kernels* kernels, unsigned tokens, int slots, int rows, int head_dim,
                   qk_grid* out) {
  const unsigned tokens_a_warp = QK_ON_TOKENS(head_dim, rows) ? QK_GROUPS(head_dim) : 1;
  const unsigned walks = (tokens + tokens_a_warp - 1) / tokens_a_warp;
  int block = qk_block_warps(slots, walks, head_dim, rows, kernels->num_sms);
  if (forced_warps) block = forced_warps;
  out->grid[0] = slots_of(slots, block);
  out->grid[2] = (walks + 65534) / 65535;
  out->grid[1] = (walks + out->grid[2] - 1) / out->grid[2];
  out->block[0] = 32;
  out->block[1] = slots_of(slots, out->grid[0]);  // as even as it goes
  out->block[2] = 1;
  out->shared = shared_of(kernels, (long long)out->grid[0] * walks, out->block[1]);
}

void qk_prepare(const qk_kernels* kernels, const qk_frac* frac, const qk_checked* c,
                const qk_params* params, qk_launch* p, qk_grid* out, long long* answer) {
  const int head_dim = c->variant.head_dim, size = c->variant.dtype == QK_F32 ? 4 : 2;
  int rows;
  qk_fill_launch(params, size, frac, p);
  const int aligned = kernels->function[0] && is_aligned(c, p);
  out->function = qk_choose_kernel(kernels, aligned, p->side[0].heads, p->side[1].heads, p->tokens,
                                   head_dim, size, &rows, answer);
  p->q_slots = qk_shape_side(&p->side[0], rows, head_dim);
  p->slots = p->q_slots + qk_shape_side(&p->side[1], rows, head_dim);
  qk_shape_grid(kernels, p->tokens, p->slots, rows, head_dim, out);
}

static int submit(void* function, const qk_grid* grid, const void* launch, void* stream) {
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
    return submit(kernels->function[grid.function], &grid, &p, stream);
  }
  qk_ready here, *to = ready ? ready : &here;
  qk_prepare(kernels, slot->frac, c, params, &to->launch, &to->grid, answer);
  to->function = kernels->function[to->grid.function];
  if (submit(to->function, &to->grid, &to->launch, stream)) return -1;
  if (to->grid.function == QK_SCALAR) to->function = 0;
  return 0;
}

int qk_cuda_run(const qk_plan* plan, const qk_checked* c, void* stream, long long* answer,
                qk_ready* ready) {
  long long key = qk_slot_key(c);
  const qk_slot* slot = find_slot(plan, c, key);
  if (ready) ready->function = 0;
  if (!slot) {
    *answer = key;
    return 0;
  }
  int pushed, status = 0;
  if (enter(c->device_id, &pushed)) return -1;
  for (int i = 0; i < c->num_parts && !status; ++i)
    if (c->part[i].tokens)
      status = launch(slot, c, &c->part[i], stream, answer, c->num_parts == 1 ? ready : 0);
  leave(pushed);
  return status;
}

int qk_cuda_again(const qk_ready* ready, int device, void* stream) {
  int pushed;
  if (enter(device, &pushed)) return -1;
  int status = submit(ready->function, &ready->grid, &ready->launch, stream);
  leave(pushed);
  return status;
}
