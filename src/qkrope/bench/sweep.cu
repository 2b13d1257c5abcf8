// sweep.cu: the yardstick. Reads the Q and K columns of each packed row and writes them back with
// one bit flipped: the least work that moves the same bytes as the fused kernel.
// A thread has VEC 16-byte words; the words of a block follow each other across row ends, so no
// thread idles except in the last block. ROW_WORDS is compiled in, so dividing by it is cheap.
// PDL, programmatic dependent launch: 0 none; the next kernel is released 1 after the loads, 2
// first.
#ifndef PDL
#define PDL 0
#endif
#ifndef VEC
#define VEC 2
#endif
#ifndef ROW_WORDS
#define ROW_WORDS 640
#endif

extern "C" __global__ void __launch_bounds__(128)
    qk_sweep(uint4* data, long long row_step, unsigned words) {
#if PDL == 2
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const unsigned first = blockIdx.x * (128u * VEC) + threadIdx.x;
  uint4* at[VEC];
  uint4 word[VEC];
#pragma unroll
  for (unsigned i = 0; i < VEC; i++) {
    const unsigned n = first + i * 128u;
    at[i] = data + n / ROW_WORDS * row_step + n % ROW_WORDS;
  }
#if PDL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#pragma unroll
  for (unsigned i = 0; i < VEC; i++)
    if (first + i * 128u < words) word[i] = *at[i];
#if PDL == 1
  asm volatile("griddepcontrol.launch_dependents;");
#endif
#pragma unroll
  for (unsigned i = 0; i < VEC; i++)
    if (first + i * 128u < words) {
      word[i].x ^= 1u;
      *at[i] = word[i];
    }
}
