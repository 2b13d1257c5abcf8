// sweep_two.cu: the yardstick of the gradients. Reads two tensors and writes a third, which is the
// least work that moves the bytes of x, dy and dx. A thread has VEC 16-byte words of each.
// PDL as in sweep.cu: the next kernel is released 1 after the loads, 2 first.
#ifndef PDL
#define PDL 1
#endif
#ifndef VEC
#define VEC 2
#endif

extern "C" __global__ void __launch_bounds__(128)
    qk_sweep_two(const uint4* x, const uint4* dy, uint4* dx, unsigned words) {
#if PDL == 2
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const unsigned first = blockIdx.x * (128u * VEC) + threadIdx.x;
  uint4 one[VEC], two[VEC];
#if PDL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#pragma unroll
  for (unsigned i = 0; i < VEC; i++)
    if (first + i * 128u < words) one[i] = x[first + i * 128u], two[i] = dy[first + i * 128u];
#if PDL == 1
  asm volatile("griddepcontrol.launch_dependents;");
#endif
#pragma unroll
  for (unsigned i = 0; i < VEC; i++)
    if (first + i * 128u < words)
      dx[first + i * 128u] = make_uint4(one[i].x ^ two[i].x, one[i].y ^ two[i].y,
                                        one[i].z ^ two[i].z, one[i].w ^ two[i].w);
}
