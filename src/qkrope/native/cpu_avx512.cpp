// cpu_avx512.cpp: the kernels for AVX-512 F, BW, VL and DQ.
#include "cpu_levels.h"
#include "cpu_run.h"
#include "cpu_simd_avx512.h"

void qk::run_avx512(const qk_variant& v, const qk_params& p, long long begin, long long end) {
  run_tokens<Avx512>(v, p, begin, end);
}

void qk::backward_avx512(const qk_variant& v, const qk_params& p, const qk_grads& g,
                         long long begin, long long end) {
  backward_blocks<Avx512>(v, p, g, begin, end);
}
