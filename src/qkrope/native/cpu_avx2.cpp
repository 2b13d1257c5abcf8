// cpu_avx2.cpp: the kernels for AVX2, FMA and F16C.
#include "cpu_levels.h"
#include "cpu_run.h"
#include "cpu_simd_avx2.h"

void qk::run_avx2(const qk_variant& v, const qk_params& p, long long begin, long long end) {
  run_tokens<Avx2>(v, p, begin, end);
}

void qk::backward_avx2(const qk_variant& v, const qk_params& p, const qk_grads& g, long long begin,
                       long long end) {
  backward_blocks<Avx2>(v, p, g, begin, end);
}
