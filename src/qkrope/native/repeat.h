// repeat.h: the call that an engine makes once a layer, known again by everything but its
// addresses.
#ifndef QKROPE_REPEAT_H
#define QKROPE_REPEAT_H

#include "plan.h"

enum { QK_REPEAT_WORDS = 48 };

// A plain in-place call on a packed CUDA tensor: its plan and flags, and of each tensor the type,
// the device, the shape, the strides and the address modulo 16.
typedef struct {
  int count;  // words in use; 0: not such a call, or one of more dimensions than fit
  long long words[QK_REPEAT_WORDS];
} qk_description;

void qk_describe(const qk_call* call, qk_description* out);
// The launch that this thread's last call of the same description was laid out as, with this call's
// addresses; null: there is none, or a tensor may share memory with qkv, and the checks must run.
qk_ready* qk_repeated(const qk_description* description, const qk_call* call);
// Keeps what a call was laid out as.
void qk_keep(const qk_description* description, const qk_call* call, const qk_ready* ready);

#endif
