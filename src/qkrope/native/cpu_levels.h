// cpu_levels.h: the two entries of each instruction set's translation unit: tokens [begin, end) of
// a call, and blocks [begin, end) of those of its gradients, each with a row of partial sums.
#ifndef QKROPE_CPU_LEVELS_H
#define QKROPE_CPU_LEVELS_H

#include "params.h"

namespace qk {

typedef void run_function(const qk_variant&, const qk_params&, long long begin, long long end);

typedef void backward_function(const qk_variant&, const qk_params&, const qk_grads&,
                               long long begin, long long end);

run_function run_scalar;
backward_function backward_scalar;
#ifdef __x86_64__
run_function run_avx2, run_avx512, run_avx512bf16;
backward_function backward_avx2, backward_avx512, backward_avx512bf16;
#endif

}  // namespace qk
#endif
