// device.h: enough of a GPU to run the kernels on a CPU, one block after another. Each lane is a
// fibre that runs up to a shuffle or a barrier and waits there for the others. A shuffle that not
// all lanes of a warp reach, a barrier that not all threads of a block reach, and a load or store
// that is not aligned to its type end the run with a message.
#include <csignal>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <setjmp.h>
#include <ucontext.h>

#define __CUDACC__ 1
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static  // blocks run one at a time
#define __grid_constant__
#define __maxnreg__(registers)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- arithmetic, rounded to nearest even as the intrinsics of these names -----------------------

inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return (float)(1.0 / std::sqrt((double)x)); }
inline float rsqrtf(float x) { return __frsqrt_rn(x); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __int2float_rn(int x) { return (float)x; }
inline int __mulhi(int a, int b) { return (int)(((long long)a * b) >> 32); }
template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }

// ---- fibres -------------------------------------------------------------------------------------

struct Index {
  unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum State { kRuns, kShuffles, kSyncs, kDone };
struct Lane {
  jmp_buf context;  // ucontext's own switch asks the system for the signal mask, each time
  bool begun;
  char* stack;
  State state;
  float value;
  unsigned from;
  int line;  // of the shuffle
};
enum { kWarp = 32, kMost = 1024, kStack = 128 << 10 };
static Lane lanes[kMost];
static int current;
static jmp_buf scheduler;
static void (*start)();
static const char* problem;
static sigjmp_buf trapped;

inline void wait_as(State state) {
  lanes[current].state = state;
  if (!_setjmp(lanes[current].context)) _longjmp(scheduler, 1);
}

// What a fibre runs: its thread of one block after another.
inline void serve() {
  for (;;) start(), wait_as(kDone);
}

inline void begin(Lane& lane) {
  if (!lane.stack) lane.stack = (char*)malloc(kStack);
  lane.begun = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = lane.stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, serve, 0);
  setcontext(&context);
}

inline float exchange(int line, float value, unsigned from) {
  Lane& lane = lanes[current];
  lane.value = value, lane.from = from, lane.line = line;
  wait_as(kShuffles);
  return lane.value;
}

// Runs every lane of a warp that can; false where its shuffle cannot be served.
inline void run_warp(int first) {
  for (int i = first; i < first + kWarp; ++i) {
    if (lanes[i].state != kRuns) continue;
    current = i;
    threadIdx = {(unsigned)(i - first), (unsigned)first / kWarp, 0};
    if (_setjmp(scheduler)) continue;
    if (lanes[i].begun) _longjmp(lanes[i].context, 1);
    begin(lanes[i]);
  }
}

// After run_warp: whether its lanes may go on.
inline bool serve_shuffle(int first) {
  const Lane& one = lanes[first];
  for (int i = first; i < first + kWarp; ++i) {
    const bool same =
        lanes[i].state == one.state && (one.state != kShuffles || lanes[i].line == one.line);
    if (!same) problem = "the lanes of a warp are not at one shuffle, barrier or end";
  }
  if (problem || one.state != kShuffles) return false;
  float values[kWarp];
  for (int i = 0; i < kWarp; ++i) values[i] = lanes[first + i].value;
  for (int i = 0; i < kWarp; ++i) {
    Lane& lane = lanes[first + i];
    lane.value = values[lane.from % kWarp], lane.state = kRuns;
  }
  return true;
}

inline void run_block(int threads) {
  for (int i = 0; i < threads; ++i) lanes[i].state = kRuns;
  for (;;) {
    int syncing = 0, done = 0;
    for (int first = 0; first < threads; first += kWarp) {
      do run_warp(first);
      while (serve_shuffle(first));
      if (problem) return;
      syncing += lanes[first].state == kSyncs;
      done += lanes[first].state == kDone;
    }
    if (done * kWarp == threads) return;
    if (syncing * kWarp != threads) {
      problem = "a barrier that some warps of the block do not reach";
      return;
    }
    for (int i = 0; i < threads; ++i) lanes[i].state = kRuns;
  }
}

static void trap(int) { siglongjmp(trapped, 1); }

}  // namespace emulated

#define __shfl_xor_sync(mask, value, step) emulated::exchange(__LINE__, value, threadIdx.x ^ (step))
#define __shfl_sync(mask, value, from) emulated::exchange(__LINE__, value, from)
#define __syncwarp() ((void)emulated::exchange(__LINE__, 0.0f, 0))
inline void __syncthreads() { emulated::wait_as(emulated::kSyncs); }
