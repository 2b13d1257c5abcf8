// bindings.h: what the files of functions for Python share.
#ifndef QKROPE_BINDINGS_H
#define QKROPE_BINDINGS_H

#include <string.h>
#include <tvm/ffi/c_api.h>

#include "plan.h"

#define EXPORT __attribute__((visibility("default")))
#define FUNCTION(name) \
  EXPORT int __tvm_ffi_##name(void* self, const TVMFFIAny* args, int32_t n, TVMFFIAny* result)

static inline int return_int(TVMFFIAny* result, int64_t value) {
  memset(result, 0, sizeof *result);
  result->type_index = kTVMFFIInt;
  result->v_int64 = value;
  return 0;
}

// The arguments of qk_norm_rope_backward.
int qk_read_backward(const TVMFFIAny* args, int n, qk_call* to);

#endif
