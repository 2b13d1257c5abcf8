// cpu_levels.h: the one entry of each instruction set's translation unit: tokens [begin, end).
#ifndef QKROPE_CPU_LEVELS_H
#define QKROPE_CPU_LEVELS_H

#include "params.h"

namespace qk {

typedef void run_function(const qk_variant&, const qk_params&, long long begin, long long end);

run_function run_scalar;
#ifdef __x86_64__
run_function run_avx2, run_avx512, run_avx512bf16;
#endif

}  // namespace qk
#endif
