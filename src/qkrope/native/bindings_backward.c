// bindings_backward.c: what tests and benchmarks ask of the backward's launches.
#include <stdint.h>

#include "backward.h"
#include "bindings.h"

// backward_prepare(address, mask of kernels, num_sms, the arguments of qk_norm_rope_backward): what
// it would launch on CUDA, as cuda_prepare.
FUNCTION(backward_prepare) {
  (void)self;
  qk_call call;
  qk_checked checked;
  if (n < 3) return qk_raise("TypeError", "backward_prepare: got %d arguments", n);
  if (qk_read_backward(args + 3, n - 3, &call)) return -1;
  call.as_cuda = 1;
  if (qk_check(&call, &checked)) return -1;
  qk_backward_step* to = (qk_backward_step*)(uintptr_t)args[0].v_int64;
  if (!to) return return_int(result, qk_backward_key(&checked));
  qk_kernels kernels = {.num_sms = (int)args[2].v_int64};
  for (int i = 0; i < QK_KERNELS; ++i)
    if (args[1].v_int64 >> i & 1) kernels.function[i] = to;  // any address but null
  long long count = 0, answer;
  for (int i = 0; i < checked.num_parts; ++i) {
    if (!checked.part[i].tokens) continue;
    const int many =
        qk_prepare_backward(&kernels, checked.part[i].frac, &checked, i, to + count, &answer);
    if (many < 0) return -1;
    count += many;
  }
  return return_int(result, count);
}

FUNCTION(backward_launch_bytes) {
  (void)self, (void)args, (void)n;
  return return_int(result, sizeof(((qk_backward_step*)0)->launch));
}

// force_backward(warps a block, warps a multiprocessor, prefetch): overrides the rules while the
// bench tries alternatives; (0, 0, -1) is the rules again.
FUNCTION(force_backward) {
  (void)self;
  if (n != 3) return qk_raise("TypeError", "force_backward: expected 3 arguments, got %d", n);
  const int block = (int)args[0].v_int64;
  if (block != 0 && block != 4 && block != 8)
    return qk_raise("ValueError", "force_backward: got blocks of %d warps, expected 0, 4 or 8",
                    block);
  qk_force_backward(block, (int)args[1].v_int64, (int)args[2].v_int64);
  return return_int(result, 0);
}
