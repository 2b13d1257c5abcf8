// cpu_tokens.h: walking the tokens of a call, and reading elements of any type.
#ifndef QKROPE_CPU_TOKENS_H
#define QKROPE_CPU_TOKENS_H

#include "params.h"

namespace qk {
namespace {

inline long long size_of(int type) { return type == QK_F32 ? 4 : 2; }

inline const char* at(const void* base, long long bytes) {
  return static_cast<const char*>(base) + bytes;
}

inline float bits_to_float(unsigned bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// One element: float, bfloat16 or half.
inline float load_float(const char* from, int type) {
  if (type == QK_F32) {
    float value;
    __builtin_memcpy(&value, from, 4);
    return value;
  }
  unsigned short word;
  __builtin_memcpy(&word, from, 2);
  unsigned bits = (unsigned)word << 16;
  if (type == QK_BF16) return bits_to_float(bits);
  // A half's exponent and fraction in a float's place are 2^112 too small; infinities and NaN
  // apart.
  unsigned sign = bits & 0x80000000u, rest = (word & 0x7fffu) << 13;
  float size = bits_to_float(rest) * 0x1p112f;
  if (rest >= 0x0f800000u) size = bits_to_float(rest | 0x7f800000u);
  return sign ? -size : size;
}

// `count` entries of any type to floats, and zeros up to the end of the last 2N. Every NaN becomes
// the one whose low half is zero, which V's rounding to bfloat16 counts on.
template <class V>
void read_floats(const void* from, int type, long long step, int count, float* to) {
  constexpr int N = V::N;
  const char* p = static_cast<const char*>(from);
  const long long size = size_of(type);
  int i = 0;
  for (; step == 1 && i + N <= count; i += N) {
    typename V::F v = type == QK_F32    ? V::template widen<QK_F32>(p + i * size)
                      : type == QK_BF16 ? V::template widen<QK_BF16>(p + i * size)
                                        : V::template widen<QK_F16>(p + i * size);
    V::store(to + i, V::canonical(v));
  }
  for (; i < count; i++) {
    float v = load_float(p + i * step * size, type);
    to[i] = v == v ? v : __builtin_nanf("");
  }
  for (i = 0; i < 2 * N; i++) to[count + i] = 0;
}

// What of an operand depends on the token: strides in elements, and the bytes of an element. A
// null `dim` stays where it is.
struct Walk {
  const long long* dim;
  long long bytes;
};

// Where the token is that `index` counts to, in each of kWalks operands. Offsets are in bytes.
template <int kWalks>
class Cursor {
 public:
  long long at[kWalks] = {};

  Cursor(const qk_params& p, const Walk (&walks)[kWalks], long long token) : p_(&p) {
    for (int d = p.ndim - 1; d >= 0; d--) {
      index_[d] = token % p.size[d];
      token /= p.size[d];
      for (int i = 0; i < kWalks; i++) {
        step_[d][i] = walks[i].dim ? walks[i].dim[d] * walks[i].bytes : 0;
        at[i] += index_[d] * step_[d][i];
      }
    }
  }

  void next() {
    for (int d = p_->ndim - 1; d >= 0; d--) {
      bool wraps = ++index_[d] == p_->size[d];
      long long by = wraps ? 1 - p_->size[d] : 1;
      for (int i = 0; i < kWalks; i++) at[i] += by * step_[d][i];
      if (!wraps) return;
      index_[d] = 0;
    }
  }

 private:
  const qk_params* p_;
  long long index_[QK_MAX_DIMS];
  long long step_[QK_MAX_DIMS][kWalks];
};

}  // namespace
}  // namespace qk
#endif
