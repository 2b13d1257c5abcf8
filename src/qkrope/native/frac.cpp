// frac.cpp: a caller's frequencies for the CPU kernels, by the formula that the CUDA kernel uses.
#include "math.h"
#include "plan.h"

extern "C" void qk_fracs_of_inv_freq(const void* inv_freq, int is_double, long long step,
                                     int reverse, int n, qk_frac* out) {
  for (int i = 0; i < n; ++i) {
    double f = is_double ? ((const double*)inv_freq)[i * step] : ((const float*)inv_freq)[i * step];
    qk::frac_of_inv_freq(reverse ? -f : f, out[i].lo, out[i].hi);
  }
}
