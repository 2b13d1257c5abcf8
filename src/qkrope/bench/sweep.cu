// sweep.cu: the yardstick. Reads the Q and K columns of each packed row and writes them back with
// one bit flipped: the least work that moves the same bytes as the fused kernel.
// grid.x: chunks of a row, grid.y: rows. VEC 16-byte words a thread, neighbours side by side.
#ifndef VEC
#define VEC 2
#endif

extern "C" __global__ void __launch_bounds__(128)
    qk_sweep(uint4* data, long long row_step, int row_words, long long rows) {
#if defined(PDL)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int first = blockIdx.x * (128 * VEC) + threadIdx.x;
  for (long long row = blockIdx.y; row < rows; row += gridDim.y) {
    uint4* at = data + row * row_step;
    uint4 word[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++)
      if (first + i * 128 < row_words) word[i] = at[first + i * 128];
#if defined(PDL)
    asm volatile("griddepcontrol.launch_dependents;");
#endif
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      word[i].x ^= 1u;
      if (first + i * 128 < row_words) at[first + i * 128] = word[i];
    }
  }
}
