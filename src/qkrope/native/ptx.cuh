// ptx.cuh: all that the kernels write in PTX, behind functions of a line each, which a machine
// without a GPU can put others in the place of (tests/emulate).
namespace {

__device__ __forceinline__ float widen_half(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// Two floats rounded to nearest even, the first in the low half.
__device__ __forceinline__ unsigned narrow_to_halves(float low, float high) {
  unsigned word;
  asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
      : "=r"(word)
      : "f"(low), "f"(high));
  return word;
}
__device__ __forceinline__ unsigned narrow_to_bfloats(float low, float high) {
  unsigned word;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#else
  unsigned l = __float_as_uint(low), h = __float_as_uint(high);
  l = low == low ? (l + 0x7fffu + ((l >> 16) & 1)) >> 16 : 0x7fffu;
  h = high == high ? (h + 0x7fffu + ((h >> 16) & 1)) >> 16 : 0x7fffu;
  word = l | h << 16;
#endif
  return word;
}

// |x| <= pi: the hardware's error bound is flat there, 4.4e-7.
__device__ __forceinline__ void sincos_by_hardware(float x, float& s, float& c) {
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(x));
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(c) : "f"(x));
}

// Programmatic dependent launch: the next kernel may start (it waits for our end by itself), and
// what the previous ones wrote is visible from here on.
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The sector of an address comes into L2, where others may still write to it.
[[maybe_unused]] __device__ __forceinline__ void fetch_into_l2(const char* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// Asks for a value here, so that what makes it is not left for after the wait below.
[[maybe_unused]] __device__ __forceinline__ void settle(float& x) { asm volatile("" : "+f"(x)); }
[[maybe_unused]] __device__ __forceinline__ void settle(const char*& pointer) {
  asm volatile("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));  // or its loads would be generic ones
}

}  // namespace
