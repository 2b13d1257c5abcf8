// cpu_tokens.h: walking the tokens of a call, and reading one element of any type.
#ifndef QKROPE_CPU_TOKENS_H
#define QKROPE_CPU_TOKENS_H

#include "params.h"

namespace qk {
namespace {

inline long long size_of(int type) { return type == QK_F32 ? 4 : 2; }

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

// Where the token is that `index` counts to. Offsets are in bytes.
class Cursor {
 public:
  enum { kQx, kQy, kKx, kKy, kPos, kCos, kSin, kOffsets };
  long long at[kOffsets] = {};

  Cursor(const qk_variant& v, const qk_params& p, long long token) : p_(&p) {
    const long long* dims[kOffsets] = {p.q.x_dim, p.q.y_dim, p.k.x_dim, p.k.y_dim,
                                       p.pos_dim, p.cos_dim, p.sin_dim};
    const long long bytes = size_of(v.dtype), table = size_of(p.table_dtype);
    const long long unit[kOffsets] = {bytes, bytes, bytes, bytes, p.pos_wide ? 8 : 4, table, table};
    const bool used[kOffsets] = {p.q.heads > 0,    p.q.heads > 0,    p.k.heads > 0,   p.k.heads > 0,
                                 p.pos != nullptr, p.cos != nullptr, p.sin != nullptr};
    for (int d = p.ndim - 1; d >= 0; d--) {
      index_[d] = token % p.size[d];
      token /= p.size[d];
      for (int i = 0; i < kOffsets; i++) {
        step_[d][i] = used[i] ? dims[i][d] * unit[i] : 0;
        at[i] += index_[d] * step_[d][i];
      }
    }
  }

  void next() {
    for (int d = p_->ndim - 1; d >= 0; d--) {
      bool wraps = ++index_[d] == p_->size[d];
      long long by = wraps ? 1 - p_->size[d] : 1;
      for (int i = 0; i < kOffsets; i++) at[i] += by * step_[d][i];
      if (!wraps) return;
      index_[d] = 0;
    }
  }

 private:
  const qk_params* p_;
  long long index_[QK_MAX_DIMS];
  long long step_[QK_MAX_DIMS][kOffsets];
};

}  // namespace
}  // namespace qk
#endif
