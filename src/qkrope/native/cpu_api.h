// cpu_api.h: the CPU kernels as the rest of the library sees them. Plain C.
#ifndef QKROPE_CPU_API_H
#define QKROPE_CPU_API_H

#include "params.h"

#ifdef __cplusplus
extern "C" {
#endif

// Chooses the instruction set of every later call: a name, or for null or "" what the environment
// variable QKROPE_ISA names, or else the best this machine has. Null on success, or an error text
// (valid until the thread's next call) and the choice is as it was.
const char* qk_cpu_select_isa(const char* name);

// "scalar" | "avx2" | "avx512" | "avx512bf16", or null before the first choice.
const char* qk_cpu_isa(void);

// Whether qk_cpu_select_isa(name) would succeed.
int qk_cpu_supported(const char* name);

// Runs a call whose parameters are already checked. Returns 0, or, with nothing written, -1 where
// no instruction set is chosen and QKROPE_ISA names none that can run.
int qk_cpu_run(const qk_variant* variant, const qk_params* params);

// The same for the gradients of such a call. The bits do not depend on the number of threads.
int qk_cpu_backward(const qk_variant* variant, const qk_params* params, const qk_grads* grads);

#ifdef __cplusplus
}
#endif
#endif
