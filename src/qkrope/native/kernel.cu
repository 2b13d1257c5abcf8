// kernel.cu: normalise, rotate and store Q and K. One warp stays on one token and walks over its
// heads; a group of lanes covers a head, and a lane holds both channels of each of its pairs, so
// that the only thing lanes exchange is the sum of squares. The macros QK_HEAD_DIM, QK_ROTARY_DIM,
// QK_PAIRING, QK_DTYPE, QK_Q_NORM, QK_K_NORM, QK_Q_WEIGHT, QK_K_WEIGHT and QK_ANGLE are the variant.
#include "math.h"
#include "params.h"

namespace {

constexpr int kHeadDim = QK_HEAD_DIM, kRotary = QK_ROTARY_DIM;
constexpr int kPairs = kHeadDim / 2, kRotatedPairs = kRotary / 2;
constexpr int kItem = QK_DTYPE == QK_F32 ? 4 : 2;
constexpr bool kHalf = QK_PAIRING == QK_HALF;
constexpr unsigned kAllLanes = 0xffffffffu;

static_assert(kHeadDim >= 2 && kHeadDim <= QK_MAX_HEAD_DIM && kHeadDim % 2 == 0, "head_dim");
static_assert(kRotary >= 0 && kRotary <= kHeadDim && kRotary % 2 == 0, "rotary_dim");
static_assert((QK_ANGLE == QK_ANGLE_NONE) == (kRotary == 0), "angle source");

// The channels of pair j: the rotated pairs come first; the rest of the head is paired for company.
__device__ __forceinline__ int channel_a(int j) {
  if (!kHalf) return 2 * j;
  return j < kRotatedPairs ? j : j + kRotatedPairs;
}
__device__ __forceinline__ int channel_b(int j) {
  if (!kHalf) return 2 * j + 1;
  return j < kRotatedPairs ? j + kRotatedPairs : j + kPairs;
}
__device__ __forceinline__ bool rotated(int j) { return kRotary == kHeadDim || j < kRotatedPairs; }

// ---- elements ---------------------------------------------------------------------------------

template <int kType>
__device__ __forceinline__ float widen_half_word(unsigned word, bool high) {
  if (kType == QK_BF16) return __uint_as_float(high ? word & 0xffff0000u : word << 16);
  float x;
  unsigned short bits = (unsigned short)(high ? word >> 16 : word);
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

template <int kType>
__device__ __forceinline__ float element(const unsigned* words, int e) {
  if (kType == QK_F32) return __uint_as_float(words[e]);
  return widen_half_word<kType>(words[e / 2], e & 1);
}

// Two floats rounded to nearest even, the first in the low half.
template <int kType>
__device__ __forceinline__ unsigned narrow_pair(float low, float high) {
  unsigned word;
  if (kType == QK_F16) {
    asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
        : "=r"(word)
        : "f"(low), "f"(high));
    return word;
  }
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#else
  unsigned l = __float_as_uint(low), h = __float_as_uint(high);
  l = low == low ? (l + 0x7fffu + ((l >> 16) & 1)) >> 16 : 0x7fffu;
  h = high == high ? (h + 0x7fffu + ((h >> 16) & 1)) >> 16 : 0x7fffu;
  word = l | h << 16;
#endif
  return word;
}

// kCount elements of kSize bytes at consecutive addresses, by loads of kBytes each.
template <int kWords, int kBytes>
__device__ __forceinline__ void load_run(const void* from, unsigned* words) {
  if (kBytes == 16 && kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      uint4 v = ((const uint4*)from)[i];
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      uint2 v = ((const uint2*)from)[i];
      words[2 * i] = v.x, words[2 * i + 1] = v.y;
    }
  }
}
template <int kWords, int kBytes>
__device__ __forceinline__ void store_run(void* to, const unsigned* words) {
  if (kBytes == 16 && kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i)
      ((uint4*)to)[i] =
          make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i)
      ((uint2*)to)[i] = make_uint2(words[2 * i], words[2 * i + 1]);
  }
}

// A lane's share of one row (a head or a weight) of kType: kUnits * 4 pairs, channels a then b for
// half pairing, a b a b ... for interleaved. kBytes is the width of a load, 0 for single elements.
template <int kType, int kUnits, int kBytes>
struct Share {
  static constexpr int kSize = kType == QK_F32 ? 4 : 2;
  static constexpr int kWords = kUnits * 8 * kSize / 4;
  unsigned words[kWords];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }
  __device__ __forceinline__ void fill_ones() {
    constexpr unsigned kOne = kType == QK_F32    ? 0x3f800000u
                              : kType == QK_BF16 ? 0x3f803f80u
                                                 : 0x3c003c00u;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = kOne;
  }
  __device__ __forceinline__ float a(int i) const { return element<kType>(words, kHalf ? i : 2 * i); }
  __device__ __forceinline__ float b(int i) const {
    return element<kType>(words, kHalf ? kUnits * 4 + i : 2 * i + 1);
  }
  __device__ __forceinline__ void set(int i, float a, float b, float& held_a, float& held_b) {
    // 16-bit elements are packed two at a time: even pairs wait for the odd one after them.
    if (kType == QK_F32) {
      words[kHalf ? i : 2 * i] = __float_as_uint(a);
      words[kHalf ? kUnits * 4 + i : 2 * i + 1] = __float_as_uint(b);
    } else if (!kHalf) {
      words[i] = narrow_pair<kType>(a, b);
    } else if (i % 2) {
      words[i / 2] = narrow_pair<kType>(held_a, a);
      words[kUnits * 2 + i / 2] = narrow_pair<kType>(held_b, b);
    }
    held_a = a, held_b = b;
  }
  __device__ __forceinline__ void load(const void* row, int first) {
    const char* base = (const char*)row;
    if constexpr (kBytes > 0) {
      if (kHalf) {
        load_run<kWords / 2, kBytes>(base + channel_a(first) * kSize, words);
        load_run<kWords / 2, kBytes>(base + channel_b(first) * kSize, words + kWords / 2);
      } else {
        load_run<kWords, kBytes>(base + channel_a(first) * kSize, words);
      }
    } else {
      clear();
#pragma unroll
      for (int i = 0; i < kUnits * 4; ++i) {
        if (first + i >= kPairs) continue;
        put(kHalf ? i : 2 * i, base, channel_a(first + i));
        put(kHalf ? kUnits * 4 + i : 2 * i + 1, base, channel_b(first + i));
      }
    }
  }
  __device__ __forceinline__ void store(void* row, int first) const {
    char* base = (char*)row;
    if constexpr (kBytes > 0) {
      if (kHalf) {
        store_run<kWords / 2, kBytes>(base + channel_a(first) * kSize, words);
        store_run<kWords / 2, kBytes>(base + channel_b(first) * kSize, words + kWords / 2);
      } else {
        store_run<kWords, kBytes>(base + channel_a(first) * kSize, words);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kUnits * 4; ++i) {
        if (first + i >= kPairs) continue;
        take(kHalf ? i : 2 * i, base, channel_a(first + i));
        take(kHalf ? kUnits * 4 + i : 2 * i + 1, base, channel_b(first + i));
      }
    }
  }

 private:
  __device__ __forceinline__ void put(int e, const char* base, int channel) {
    if (kSize == 4)
      words[e] = ((const unsigned*)base)[channel];
    else
      words[e / 2] |= (unsigned)((const unsigned short*)base)[channel] << (e % 2 * 16);
  }
  __device__ __forceinline__ void take(int e, char* base, int channel) const {
    if (kSize == 4)
      ((unsigned*)base)[channel] = words[e];
    else
      ((unsigned short*)base)[channel] = (unsigned short)(words[e / 2] >> (e % 2 * 16));
  }
};

// ---- angles -----------------------------------------------------------------------------------

__device__ __forceinline__ void sincos_of_phase(int phase, float& s, float& c) {
  if (QK_DTYPE == QK_F32) {
    qk::sincos_phase(phase, s, c);
  } else {  // |x| <= pi: the hardware's error bound is flat there, 4.4e-7
    float x = __fmul_rn((float)phase, 1.46291807926715968e-9f);
    asm("sin.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(x));
    asm("cos.approx.ftz.f32 %0, %1;" : "=f"(c) : "f"(x));
  }
}

// Cosine and sine of a lane's pairs. Channels a and b differ only under a full-width table.
template <int kCount>
struct Angles {
  static constexpr int kSecond = QK_ANGLE == QK_ANGLE_TABLE ? kCount : 1;
  float cos_a[kCount], sin_a[kCount], cos_b[kSecond], sin_b[kSecond];
};

__device__ __forceinline__ float table_value(const void* table, int type, long long at) {
  if (type == QK_F32) return ((const float*)table)[at];
  unsigned word = ((const unsigned short*)table)[at];
  return type == QK_BF16 ? widen_half_word<QK_BF16>(word, false)
                         : widen_half_word<QK_F16>(word, false);
}

template <int kCount>
__device__ __forceinline__ void read_table(const qk_params& p, long long cos_at, long long sin_at,
                                           bool bad, int first, Angles<kCount>& angle) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    int j = first + i;
    if (j >= kRotatedPairs) continue;
    if (bad) {
      angle.cos_a[i] = angle.sin_a[i] = __int_as_float(0x7fffffff);
      if (angle.kSecond > 1) angle.cos_b[i] = angle.sin_b[i] = __int_as_float(0x7fffffff);
      continue;
    }
    int a = p.table_full ? channel_a(j) : j, b = p.table_full ? channel_b(j) : j;
    angle.cos_a[i] = table_value(p.cos, p.table_dtype, cos_at + a * p.cos_step);
    angle.sin_a[i] = table_value(p.sin, p.table_dtype, sin_at + a * p.sin_step);
    if (angle.kSecond > 1) {
      angle.cos_b[i] = table_value(p.cos, p.table_dtype, cos_at + b * p.cos_step);
      angle.sin_b[i] = table_value(p.sin, p.table_dtype, sin_at + b * p.sin_step);
    }
  }
}

__device__ __forceinline__ qk_frac caller_frac(const qk_params& p, int j) {
  double f = p.inv_freq_dtype == QK_F64 ? ((const double*)p.inv_freq)[j * p.inv_freq_step]
                                        : (double)((const float*)p.inv_freq)[j * p.inv_freq_step];
  qk_frac frac;
  qk::frac_of_inv_freq(f, frac.lo, frac.hi);
  return frac;
}

// ---- the walk over a token's heads ------------------------------------------------------------

// Offsets of a token, from its index in the coalesced leading dimensions.
struct Token {
  long long q_x, q_y, k_x, k_y, pos, cos, sin;
};

__device__ __forceinline__ void advance(const qk_params& p, int d, long long i, Token& t) {
  t.q_x += i * p.q.x_dim[d], t.q_y += i * p.q.y_dim[d];
  t.k_x += i * p.k.x_dim[d], t.k_y += i * p.k.y_dim[d];
  if (QK_ANGLE != QK_ANGLE_NONE) t.pos += i * p.pos_dim[d];
  if (QK_ANGLE == QK_ANGLE_TABLE) t.cos += i * p.cos_dim[d], t.sin += i * p.sin_dim[d];
}

__device__ __forceinline__ Token locate(const qk_params& p, unsigned token) {
  Token t = {0, 0, 0, 0, 0, 0, 0};
#pragma unroll 1
  for (int d = p.ndim - 1; d > 0; --d) {
    unsigned size = (unsigned)p.size[d];
    advance(p, d, token % size, t);
    token /= size;
  }
  advance(p, 0, token, t);
  return t;
}

// Sum over the lanes of a group; every lane gets it. The tree is that of kLanes rounded up to a
// power of two with zeros, whatever the lanes hold, so that layouts agree bit for bit.
template <int kLanes>
__device__ __forceinline__ float group_sum(float x, int base, int rank) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    if ((kLanes & (kLanes - 1)) == 0) {
      x = __fadd_rn(x, __shfl_xor_sync(kAllLanes, x, step));
    } else {
      int from = (rank ^ step) & ~(step - 1);
      float other = __shfl_sync(kAllLanes, x, base + from);
      x = __fadd_rn(x, from < kLanes ? other : 0.0f);
    }
  }
  return x;
}

template <int kUnits, int kBytes>
__device__ __forceinline__ void run(const qk_params& p, int warps_per_token) {
  constexpr int kLanes = (QK_UNITS(kHeadDim) + kUnits - 1) / kUnits;
  constexpr int kHeads = 32 / kLanes;  // a pass
  constexpr int kCount = kUnits * 4;   // pairs a lane
  using Row = Share<QK_DTYPE, kUnits, kBytes>;
  using QWeight = Share<QK_Q_WEIGHT, kUnits, kBytes>;
  using KWeight = Share<QK_K_WEIGHT, kUnits, kBytes>;

  // 1. Place: which token, which share of its passes, which pairs of which head.
  const int lane = threadIdx.x % 32, group = lane / kLanes, rank = lane % kLanes;
  const int first = rank * kCount;
  const unsigned warp = blockIdx.x * QK_BLOCK_WARPS + threadIdx.x / 32;
  const unsigned token = warp / warps_per_token;
  if (token >= p.tokens) return;
  const int q_passes = (p.q.heads + kHeads - 1) / kHeads;
  const int passes = q_passes + (p.k.heads + kHeads - 1) / kHeads;
  int pass = warp - token * warps_per_token;

  // 2. What no earlier kernel on the stream can have written, before waiting for that kernel.
  QWeight q_weight;
  KWeight k_weight;
  qk_frac frac[kCount];
  q_weight.fill_ones();
  k_weight.fill_ones();
  if (p.early_weights) {
    if (p.q.weight) q_weight.load(p.q.weight, first);
    if (p.k.weight) k_weight.load(p.k.weight, first);
  }
  if (QK_ANGLE == QK_ANGLE_PHASE) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (first + i < kRotatedPairs) frac[i] = p.frac[first + i];
  }
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (!p.early_weights) {
    if (p.q.weight) q_weight.load(p.q.weight, first);
    if (p.k.weight) k_weight.load(p.k.weight, first);
  }

  // 3. Load: the position, and two passes of heads in flight from here on.
  const Token at = locate(p, token);
  int position = 0;
  bool bad = false;
  if (QK_ANGLE != QK_ANGLE_NONE && p.pos) {
    if (p.pos_wide) {
      int2 words = ((const int2*)p.pos)[at.pos];
      position = words.x;
      bad = words.y != words.x >> 31;
    } else {
      position = ((const int*)p.pos)[at.pos];
    }
  }
  auto load = [&](int pass, Row& row) {
    bool is_k = pass >= q_passes;
    int head = (is_k ? pass - q_passes : pass) * kHeads + group;
    if (group < kHeads && pass < passes && head < (is_k ? p.k.heads : p.q.heads)) {
      long long offset = is_k ? at.k_x + head * p.k.x_head : at.q_x + head * p.q.x_head;
      row.load((const char*)(is_k ? p.k.x : p.q.x) + offset * kItem, first);
    } else {
      row.clear();
    }
  };
  Row rows[2];
  load(pass, rows[0]);
  load(pass + warps_per_token, rows[1]);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif

  // 4. Angles: once for the token.
  Angles<kCount> angle;
  if (QK_ANGLE == QK_ANGLE_TABLE) {
    long long row = 0, sin_row = 0;
    if (p.table_rows) {
      bad |= position < 0 || position >= p.table_rows;
      row = position * p.cos_row, sin_row = position * p.sin_row;
    }
    read_table(p, at.cos + row, at.sin + sin_row, bad, first, angle);
  } else if (QK_ANGLE != QK_ANGLE_NONE) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i >= kRotatedPairs) continue;
      if (QK_ANGLE == QK_ANGLE_INV_FREQ) frac[i] = caller_frac(p, first + i);
      float s, c;
      sincos_of_phase(qk::phase(position, frac[i].lo, frac[i].hi), s, c);
      float factor = bad ? __int_as_float(0x7fffffff) : p.attention_factor;
      angle.cos_a[i] = __fmul_rn(c, factor);
      angle.sin_a[i] = __fmul_rn(s, factor);
    }
  }

  // 5. Finish: statistic, normalise, rotate, store, one head of the group at a time.
  float weight_a[kCount], weight_b[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    weight_a[i] = qk::effective_weight(q_weight.a(i), p.q.weight_offset);
    weight_b[i] = qk::effective_weight(q_weight.b(i), p.q.weight_offset);
  }
  bool on_k = false;
  auto finish = [&](int pass, Row& row) {
    const bool is_k = pass >= q_passes;
    if (is_k && !on_k) {
      on_k = true;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        weight_a[i] = qk::effective_weight(k_weight.a(i), p.k.weight_offset);
        weight_b[i] = qk::effective_weight(k_weight.b(i), p.k.weight_offset);
      }
    }
    float rstd = 1.0f;
    const bool normed = is_k ? QK_K_NORM == QK_NORM_RMS : QK_Q_NORM == QK_NORM_RMS;
    if (QK_Q_NORM == QK_NORM_RMS || QK_K_NORM == QK_NORM_RMS) {
      float unit[kUnits];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        unit[u] = 0.0f;
#pragma unroll
        for (int i = 4 * u; i < 4 * u + 4; ++i) {
          unit[u] = qk::fma(row.a(i), row.a(i), unit[u]);
          unit[u] = qk::fma(row.b(i), row.b(i), unit[u]);
        }
      }
#pragma unroll
      for (int step = 1; step < kUnits; step *= 2)
#pragma unroll
        for (int u = 0; u + step < kUnits; u += 2 * step) unit[u] = qk::add(unit[u], unit[u + step]);
      float sum = group_sum<kLanes>(unit[0], group * kLanes, rank);
      rstd = rsqrtf(qk::fma(sum, 1.0f / kHeadDim, is_k ? p.k.eps : p.q.eps));
    }
    const int head = (is_k ? pass - q_passes : pass) * kHeads + group;
    const bool owned = group < kHeads && head < (is_k ? p.k.heads : p.q.heads);
    float held_a = 0.0f, held_b = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float a = row.a(i), b = row.b(i);
      if (normed) {
        a = qk::mul(qk::mul(a, rstd), weight_a[i]);
        b = qk::mul(qk::mul(b, rstd), weight_b[i]);
      }
      if (kRotary && rotated(first + i)) {
        float ya, yb;
        const bool table = QK_ANGLE == QK_ANGLE_TABLE;
        qk::rotate(a, b, angle.cos_a[i], angle.sin_a[i], table ? angle.cos_b[i] : angle.cos_a[i],
                   table ? angle.sin_b[i] : angle.sin_a[i], ya, yb);
        a = ya, b = yb;
      }
      row.set(i, a, b, held_a, held_b);
    }
    if (owned) {
      long long offset = is_k ? at.k_y + head * p.k.y_head : at.q_y + head * p.q.y_head;
      row.store((char*)(is_k ? p.k.y : p.q.y) + offset * kItem, first);
    }
  };
#pragma unroll 1
  for (; pass < passes; pass += warps_per_token) {
    Row row = rows[0];
    rows[0] = rows[1];
    load(pass + 2 * warps_per_token, rows[1]);
    finish(pass, row);
  }
}

// Loads of four pairs' channels are aligned where both halves of the rotated part and of the rest
// are whole numbers of them.
[[maybe_unused]] constexpr bool kFours = kHalf ? kRotatedPairs % 4 == 0 && kPairs % 4 == 0 : kHeadDim % 8 == 0;
[[maybe_unused]] constexpr bool kEights = kHalf && kItem == 2 && kRotatedPairs % 8 == 0 && kPairs % 8 == 0;
[[maybe_unused]] constexpr int kUnitsWide = QK_LANE_UNITS(kHeadDim, 1);
constexpr int kUnitsLeast = QK_LANE_UNITS(kHeadDim, 0);

}  // namespace

#define QK_KERNEL(name, units, bytes)                                                           \
  extern "C" __global__ void __launch_bounds__(32 * QK_BLOCK_WARPS)                             \
      name(const __grid_constant__ qk_params p, const int warps_per_token) {                    \
    run<units, bytes>(p, warps_per_token);                                                      \
  }

#if QK_HAS_WIDE
static_assert(kEights && QK_UNITS(kHeadDim) % kUnitsWide == 0, "wide loads");
QK_KERNEL(qkrope_wide, kUnitsWide, 16)
#endif
#if QK_HAS_NARROW
static_assert(kFours && QK_UNITS(kHeadDim) % kUnitsLeast == 0, "narrow loads");
QK_KERNEL(qkrope_narrow, kUnitsLeast, kHalf && kItem == 2 ? 8 : 16)
#endif
QK_KERNEL(qkrope_scalar, kUnitsLeast, 0)
