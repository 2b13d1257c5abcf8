// kernel.cu: normalise, rotate and store Q and K. A group of lanes covers a head and stays on one
// token for a few heads of q or of k; a lane holds both channels of each of its pairs, so that the
// only thing lanes exchange is the sum of squares. The macros QK_HEAD_DIM, QK_ROTARY_DIM,
// QK_PAIRING, QK_DTYPE, QK_Q_NORM, QK_K_NORM, QK_Q_WEIGHT, QK_K_WEIGHT, QK_ANGLE, QK_VECTOR_BYTES
// are the variant.
#include "math.h"
#include "params.h"

namespace {

constexpr int kHeadDim = QK_HEAD_DIM, kRotary = QK_ROTARY_DIM;
constexpr int kPairs = kHeadDim / 2, kRotatedPairs = kRotary / 2;
constexpr bool kHalf = QK_PAIRING == QK_HALF;
constexpr int kUnits = QK_LANE_UNITS(kHeadDim);
constexpr int kLanes = QK_LANES(kHeadDim);
constexpr int kGroups = QK_GROUPS(kHeadDim);
constexpr int kPasses = QK_PASSES(kHeadDim);
constexpr int kCount = kUnits * 4;  // pairs a lane
// Held from before the wait, except where that would cost a spill.
constexpr bool kEarlyFrac = kUnits != 2;
constexpr unsigned kAllLanes = 0xffffffffu;
// No lane holds rotated and unrotated pairs both.
constexpr bool kWholeLanes = kRotatedPairs % kCount == 0;

static_assert(kHeadDim >= 2 && kHeadDim <= QK_MAX_HEAD_DIM && kHeadDim % 2 == 0, "head_dim");
static_assert(kRotary >= 0 && kRotary <= kHeadDim && kRotary % 2 == 0, "rotary_dim");
static_assert((QK_ANGLE == QK_ANGLE_NONE) == (kRotary == 0), "angle source");

// The channels of pair j. The rotated pairs come first; the rest of the head is paired for company,
// at the rotated pairs' distance where whole blocks of them fill it, so that a lane's two runs lie
// as far apart in every lane.
constexpr bool kBlocked =
    kRotary > 0 && kRotary < kHeadDim&& kHeadDim % (kRotary > 0 ? kRotary : 1) == 0;

// Otherwise a lane's two runs lie as far apart as its place in the head says.
constexpr bool kSpread = kHalf && kRotary > 0 && kRotary < kHeadDim && !kBlocked;

__device__ __forceinline__ int channel_a(int j) {
  if (!kHalf) return 2 * j;
  if (kBlocked) return j + j / kRotatedPairs * kRotatedPairs;
  return j < kRotatedPairs ? j : j + kRotatedPairs;
}
__device__ __forceinline__ int channel_b(int j) {
  if (!kHalf) return 2 * j + 1;
  if (kBlocked) return channel_a(j) + kRotatedPairs;
  return j < kRotatedPairs ? j + kRotatedPairs : j + kPairs;
}
// Pair i of the lane whose first is `first`.
__device__ __forceinline__ bool rotated(int first, int i) {
  return kRotary == kHeadDim || first + (kWholeLanes ? 0 : i) < kRotatedPairs;
}

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
template <int kType, int kBytes>
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
  __device__ __forceinline__ float a(int i) const {
    return element<kType>(words, kHalf ? i : 2 * i);
  }
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
  // Units are summed on their own and then pairwise, as group_sum goes on across lanes.
  __device__ __forceinline__ float sum_of_squares() const {
    float unit[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float sum_a = qk::mul(a(4 * u), a(4 * u)), sum_b = qk::mul(b(4 * u), b(4 * u));
#pragma unroll
      for (int i = 4 * u + 1; i < 4 * u + 4; ++i) {
        sum_a = qk::fma(a(i), a(i), sum_a);
        sum_b = qk::fma(b(i), b(i), sum_b);
      }
      unit[u] = qk::add(sum_a, sum_b);
    }
#pragma unroll
    for (int step = 1; step < kUnits; step *= 2)
#pragma unroll
      for (int u = 0; u + step < kUnits; u += 2 * step) unit[u] = qk::add(unit[u], unit[u + step]);
    return unit[0];
  }
  // Where a lane's share of a row begins: at its own channels, or (single elements) with the row.
  __device__ __forceinline__ static int place(int first) {
    return kBytes ? channel_a(first) * kSize : 0;
  }
  __device__ __forceinline__ void load(const char* from, int first) {
    if constexpr (kBytes > 0) {
      if (kHalf) {
        load_run<kWords / 2, kBytes>(from, words);
        load_run<kWords / 2, kBytes>(from + apart(first), words + kWords / 2);
      } else {
        load_run<kWords, kBytes>(from, words);
      }
    } else {
      clear();
#pragma unroll
      for (int i = 0; i < kUnits * 4; ++i) {
        if (first + i >= kPairs) continue;
        put(kHalf ? i : 2 * i, from, channel_a(first + i));
        put(kHalf ? kUnits * 4 + i : 2 * i + 1, from, channel_b(first + i));
      }
    }
  }
  __device__ __forceinline__ void store(char* to, int first) const {
    if constexpr (kBytes > 0) {
      if (kHalf) {
        store_run<kWords / 2, kBytes>(to, words);
        store_run<kWords / 2, kBytes>(to + apart(first), words + kWords / 2);
      } else {
        store_run<kWords, kBytes>(to, words);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kUnits * 4; ++i) {
        if (first + i >= kPairs) continue;
        take(kHalf ? i : 2 * i, to, channel_a(first + i));
        take(kHalf ? kUnits * 4 + i : 2 * i + 1, to, channel_b(first + i));
      }
    }
  }

 private:
  // Bytes from a lane's a channels to its b channels: a constant for a fully rotated head.
  __device__ __forceinline__ static int apart(int first) {
    if (kRotary == 0 || kRotary == kHeadDim) return kPairs * kSize;
    if (kBlocked) return kRotatedPairs * kSize;
    return (first < kRotatedPairs ? kRotatedPairs : kPairs - kRotatedPairs) * kSize;
  }
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

#define QK_NAN __int_as_float(0x7fffffff)

__device__ __forceinline__ float table_value(const void* table, int type, long long at) {
  if (type == QK_F32) return ((const float*)table)[at];
  unsigned word = ((const unsigned short*)table)[at];
  return type == QK_BF16 ? widen_half_word<QK_BF16>(word, false)
                         : widen_half_word<QK_F16>(word, false);
}

// The table is ours and aligned, so two entries make a 16-byte load.
__device__ __forceinline__ void read_frac(const qk_frac* table, int first,
                                          qk_frac (&frac)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    if (first + i + 1 < kRotatedPairs) {
      const int4 two = *(const int4*)(table + first + i);
      frac[i].lo = two.x, frac[i].hi = two.y, frac[i + 1].lo = two.z, frac[i + 1].hi = two.w;
    } else if (first + i < kRotatedPairs) {
      frac[i] = table[first + i];
    }
  }
}

__device__ __forceinline__ qk_frac caller_frac(const qk_launch& p, int j) {
  double f = p.inv_freq_dtype == QK_F64 ? ((const double*)p.inv_freq)[j * p.inv_freq_step]
                                        : (double)((const float*)p.inv_freq)[j * p.inv_freq_step];
  qk_frac frac;
  qk::frac_of_inv_freq(f, frac.lo, frac.hi);
  return frac;
}

// ---- the walk over a token's heads ------------------------------------------------------------

// Byte offsets of a token, from its index in the coalesced leading dimensions.
struct Token {
  long long x, y, pos, cos, sin;
};

__device__ __forceinline__ Token locate(const qk_launch& p, int side, unsigned token) {
  Token t = {0, 0, 0, 0, 0};
  if (p.ndim == 1 && QK_ANGLE != QK_ANGLE_TABLE) {
    t.x = token * p.side[side].x_token, t.y = token * p.side[side].y_token;
    t.pos = token * p.pos_token;
    return t;
  }
#pragma unroll 1
  for (int d = p.ndim - 1; d >= 0; --d) {
    unsigned i = d ? token % p.size[d] : token;
    if (d) token /= p.size[d];
    t.x += i * p.x_dim[side][d], t.y += i * p.y_dim[side][d];
    t.pos += i * p.pos_dim[d];
    if (QK_ANGLE == QK_ANGLE_TABLE) t.cos += i * p.cos_dim[d], t.sin += i * p.sin_dim[d];
  }
  return t;
}

// Sums over the lanes of a group, for kRows rows at once; every lane gets them. The tree is that of
// kLanes rounded up to a power of two with zeros, whatever the lanes hold.
template <int kRows>
__device__ __forceinline__ void group_sums(float (&sums)[kRows], int base, int rank) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int from = (rank ^ step) & ~(step - 1);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if ((kLanes & (kLanes - 1)) == 0) {
        sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(kAllLanes, sums[i], step));
      } else {
        const float other = __shfl_sync(kAllLanes, sums[i], base + from);
        sums[i] = __fadd_rn(sums[i], from < kLanes ? other : 0.0f);
      }
    }
  }
}

// What the rotation multiplies a lane's normalised channels by, weights inside:
// y_a = n_a * aa - n_b * ab, y_b = n_b * bb + n_a * ba, with n = x * rstd.
struct Factors {
  float aa[kCount], ab[kCount] = {}, bb[kCount], ba[kCount] = {};
};

template <typename Weight>
__device__ __forceinline__ void weigh(const Weight& weight, float offset, Factors& f) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) f.aa[i] = weight.a(i), f.bb[i] = weight.b(i);
  if (offset != 0.0f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      f.aa[i] = qk::effective_weight(f.aa[i], offset);
      f.bb[i] = qk::effective_weight(f.bb[i], offset);
    }
  }
}

__device__ __forceinline__ void turn(int i, float ca, float sa, float cb, float sb, Factors& f) {
  const float a = f.aa[i], b = f.bb[i];
  f.aa[i] = qk::mul(a, ca), f.ab[i] = qk::mul(b, sa);
  f.bb[i] = qk::mul(b, cb), f.ba[i] = qk::mul(a, sb);
}

__device__ __forceinline__ void turn_by_table(const qk_launch& p, const Token& at, int position,
                                              bool bad, int first, Factors& f) {
  long long cos_at = at.cos, sin_at = at.sin;
  if (p.table_rows) {
    bad |= position < 0 || position >= p.table_rows;
    cos_at = bad ? 0 : position * p.cos_row, sin_at = bad ? 0 : position * p.sin_row;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int j = first + i;
    if (j >= kRotatedPairs) continue;
    const int a = p.table_full ? channel_a(j) : j, b = p.table_full ? channel_b(j) : j;
    float ca = table_value(p.cos, p.table_dtype, cos_at + a * p.cos_step);
    float sa = table_value(p.sin, p.table_dtype, sin_at + a * p.sin_step);
    float cb = ca, sb = sa;
    if (p.table_full) {
      cb = table_value(p.cos, p.table_dtype, cos_at + b * p.cos_step);
      sb = table_value(p.sin, p.table_dtype, sin_at + b * p.sin_step);
    }
    if (bad) ca = sa = cb = sb = QK_NAN;
    turn(i, ca, sa, cb, sb, f);
  }
}

__device__ __forceinline__ void turn_by_phase(const qk_launch& p, int position, bool bad, int first,
                                              const qk_frac (&frac)[kCount], Factors& f) {
  const float factor = bad ? QK_NAN : p.attention_factor;
  if (kWholeLanes && first >= kRotatedPairs) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (!kWholeLanes && first + i >= kRotatedPairs) continue;
    float s, c;
    sincos_of_phase(qk::phase(position, frac[i].lo, frac[i].hi), s, c);
    if (factor != 1.0f) s = qk::mul(s, factor), c = qk::mul(c, factor);
    turn(i, c, s, c, s, f);
  }
}

// Programmatic dependent launch: the next kernel may start (it waits for our end by itself), and
// what the previous ones wrote is visible from here on.
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <int kRows, typename Row>
__device__ __forceinline__ void finish(const qk_launch_side& side, bool is_k, Row* rows,
                                       const Factors& f, int first, int base, int rank, int count,
                                       char* y) {
  float rstd[kRows];
  if (QK_Q_NORM == QK_NORM_RMS || QK_K_NORM == QK_NORM_RMS) {
    const bool normed = is_k ? QK_K_NORM == QK_NORM_RMS : QK_Q_NORM == QK_NORM_RMS;
#pragma unroll
    for (int i = 0; i < kRows; ++i) rstd[i] = rows[i].sum_of_squares();
    group_sums(rstd, base, rank);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      rstd[i] = normed ? rsqrtf(qk::fma(rstd[i], 1.0f / kHeadDim, side.eps)) : 1.0f;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float held_a = 0.0f, held_b = 0.0f;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float a = rows[i].a(j), b = rows[i].b(j);
      if (QK_Q_NORM == QK_NORM_RMS || QK_K_NORM == QK_NORM_RMS)
        a = qk::mul(a, rstd[i]), b = qk::mul(b, rstd[i]);
      // A channel that is not rotated must not see its company, which may be NaN.
      const bool turns = rotated(first, j);
      const float cross_b = turns ? b : 0.0f, cross_a = turns ? a : 0.0f;
      float ya, yb, unused;
      qk::rotate(a, cross_b, f.aa[j], f.ab[j], 0.0f, 0.0f, ya, unused);
      qk::rotate(cross_a, b, 0.0f, 0.0f, f.bb[j], f.ba[j], unused, yb);
      rows[i].set(j, ya, yb, held_a, held_b);
    }
    if (i < count) rows[i].store(y + i * side.y_head, first);
  }
}

template <int kType, int kBytes>
__device__ __forceinline__ void read_weight(const void* weight, int first,
                                            Share<kType, kBytes>& share) {
  if (weight)
    share.load((const char*)weight + share.place(first), first);
  else
    share.fill_ones();
}

template <int kBytes>
__device__ __forceinline__ void run(const qk_launch& p) {
  release_next();

  // 1. Place: which token, which heads of q or of k, which pairs of a head.
  const int group = threadIdx.x / kLanes, rank = threadIdx.x % kLanes, first = rank * kCount;
  const int is_k = (int)blockIdx.x >= p.q_slots;
  const qk_launch_side& side = p.side[is_k];
  const unsigned step = p.groups_on_tokens ? kGroups : 1;
  unsigned token = ((blockIdx.z * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y) * step;
  int slot = blockIdx.x - (is_k ? p.q_slots : 0);
  if (token >= p.tokens) return;  // the whole warp
  if (p.groups_on_tokens)
    token += group;
  else
    slot = slot * kGroups + group;
  const int base = slot * side.passes;
  int count = group < kGroups && token < p.tokens ? min(side.heads - base, side.passes) : 0;
  const Token at = locate(p, is_k, count > 0 ? token : 0);
  using Row = Share<QK_DTYPE, kBytes>;
  const char* x = side.x + at.x + base * side.x_head + Row::place(first);
  char* y = side.y + at.y + base * side.y_head + Row::place(first);

  // 2. What no earlier kernel on the stream can have written, before waiting for that kernel.
  qk_frac frac[kCount];
  if (QK_ANGLE == QK_ANGLE_PHASE && kEarlyFrac) read_frac(p.frac, first, frac);
  Share<QK_Q_WEIGHT, kBytes> q_weight;  // of k too, where it has the same type
  Share<QK_K_WEIGHT, kBytes> k_weight;
  constexpr bool kOneType = QK_Q_WEIGHT == QK_K_WEIGHT;
  auto read_weights = [&] {
    if (kOneType || !is_k)
      read_weight(side.weight, first, q_weight);
    else
      read_weight(side.weight, first, k_weight);
  };
  if (p.early_weights) read_weights();
  wait_for_previous();

  if (!p.early_weights) read_weights();

  // 3. Load: every head of the walk in flight at once, and the position.
  Row rows[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    rows[i].clear();
    if (i < count) rows[i].load(x + i * side.x_head, first);
  }
  int position = 0, high_word = 0;
  if (QK_ANGLE != QK_ANGLE_NONE && (QK_ANGLE != QK_ANGLE_TABLE || p.pos)) {
    position = *(const int*)(p.pos + at.pos);
    if (p.pos_wide) high_word = ((const int*)(p.pos + at.pos))[1];
  }

  // 4. Angles: once for the token, folded with the weights for every head of the walk.
  Factors factors;
  const bool bad = p.pos_wide && high_word != position >> 31;
  if (kOneType || !is_k)
    weigh(q_weight, side.weight_offset, factors);
  else
    weigh(k_weight, side.weight_offset, factors);
  if (QK_ANGLE == QK_ANGLE_PHASE && !kEarlyFrac) read_frac(p.frac, first, frac);
  if (QK_ANGLE == QK_ANGLE_INV_FREQ) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (first + i < kRotatedPairs) frac[i] = caller_frac(p, first + i);
  }
  if (QK_ANGLE == QK_ANGLE_TABLE)
    turn_by_table(p, at, position, bad, first, factors);
  else if (QK_ANGLE != QK_ANGLE_NONE)
    turn_by_phase(p, position, bad, first, frac, factors);

  // 5. Finish: statistics of all heads, then normalise, rotate and store one after the other. No
  // store begins before every load is back: heads may share a cache line.
  if (side.passes == 1)
    finish<1>(side, is_k, rows, factors, first, group * kLanes, rank, count, y);
  else
    finish<kPasses>(side, is_k, rows, factors, first, group * kLanes, rank, count, y);
}

// A lane's runs are aligned and consecutive where both halves of the rotated part and of the rest
// are whole numbers of them.
[[maybe_unused]] constexpr bool kRuns =
    QK_UNITS(kHeadDim) % kUnits == 0 &&
    (kHalf ? kRotatedPairs % kCount == 0 && kPairs % kCount == 0 : kHeadDim % 8 == 0);

// Blocks an SM that ptxas must leave registers for, as measured: 9 are 56 registers, 7 are 72.
constexpr bool kPowerOfTwo = (kLanes & (kLanes - 1)) == 0;
constexpr bool kPartly = kRotary > 0 && kRotary < kHeadDim;
[[maybe_unused]] constexpr int kMinBlocks = QK_DTYPE == QK_F32 || kUnits > 2 ? 1
                                            : kUnits == 2                    ? (kPartly ? 5 : 7)
                                            : kPartly                        ? 7
                                            : kPowerOfTwo                    ? 9
                                            : kLanes < 14                    ? 7
                                                                             : 8;

}  // namespace

#define QK_KERNEL(name, bytes, blocks)                                      \
  extern "C" __global__ void __launch_bounds__(32 * QK_BLOCK_WARPS, blocks) \
      name(const __grid_constant__ qk_launch p) {                           \
    run<bytes>(p);                                                          \
  }

#if QK_VECTOR_BYTES
static_assert(kRuns, "vector loads");
QK_KERNEL(qkrope_vector, QK_VECTOR_BYTES, kMinBlocks)
#endif
QK_KERNEL(qkrope_scalar, 0, 1)
