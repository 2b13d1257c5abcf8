// cpu_scalar.cpp: the kernels for the baseline of the target.
#include "cpu_levels.h"
#include "cpu_run.h"
#include "cpu_simd_portable.h"

void qk::run_scalar(const qk_variant& v, const qk_params& p, long long begin, long long end) {
  run_tokens<Portable>(v, p, begin, end);
}

void qk::backward_scalar(const qk_variant& v, const qk_params& p, const qk_grads& g,
                         long long begin, long long end) {
  backward_blocks<Portable>(v, p, g, begin, end);
}
