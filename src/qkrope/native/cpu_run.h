// cpu_run.h: the entries of one instruction set: which kernel runs a call, or its gradients.
#ifndef QKROPE_CPU_RUN_H
#define QKROPE_CPU_RUN_H

#include "cpu_backward.h"
#include "cpu_general.h"
#include "cpu_kernel.h"

namespace qk {
namespace {

template <class V, int kType>
void run_typed(const qk_variant& v, const qk_params& p, long long begin, long long end) {
  if (p.general) return General<V, kType>(v, p, false).run(begin, end);
  if (!p.q.heads && !p.k.heads) {
  } else if (v.pairing == QK_INTERLEAVED) {
    Kernel<V, kType, QK_INTERLEAVED>(v, p).run(begin, end);
  } else {
    Kernel<V, kType, QK_HALF>(v, p).run(begin, end);
  }
  if (p.v.heads) General<V, kType>(v, p, true).run(begin, end);
}

template <class V>
void run_tokens(const qk_variant& v, const qk_params& p, long long begin, long long end) {
  if (v.dtype == QK_F32) return run_typed<V, QK_F32>(v, p, begin, end);
  if (v.dtype == QK_BF16) return run_typed<V, QK_BF16>(v, p, begin, end);
  run_typed<V, QK_F16>(v, p, begin, end);
}

template <class V>
void backward_blocks(const qk_variant& v, const qk_params& p, const qk_grads& g, long long begin,
                     long long end) {
  if (v.dtype == QK_F32) return Backward<V, QK_F32>(v, p, g).run(begin, end);
  if (v.dtype == QK_BF16) return Backward<V, QK_BF16>(v, p, g).run(begin, end);
  Backward<V, QK_F16>(v, p, g).run(begin, end);
}

}  // namespace
}  // namespace qk
#endif
