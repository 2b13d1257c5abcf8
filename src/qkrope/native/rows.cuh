// rows.cuh: where the channels of a head lie among the lanes, and how a lane's share of a row is
// read, summed and written. The variant's macros come before it (see kernel.cu).
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
constexpr bool kPowerOfTwo = (kLanes & (kLanes - 1)) == 0;
constexpr bool kPartly = kRotary > 0 && kRotary < kHeadDim;
constexpr unsigned kAllLanes = 0xffffffffu;
// No lane holds rotated and unrotated pairs both.
constexpr bool kWholeLanes = kRotatedPairs % kCount == 0;

constexpr bool kNormed = QK_Q_NORM == QK_NORM_RMS || QK_K_NORM == QK_NORM_RMS;
// Where every channel turns, attention factor and a bad position's NaN go with the row's scale.
constexpr bool kScaled =
    kRotary == kHeadDim && kNormed && (QK_ANGLE == QK_ANGLE_PHASE || QK_ANGLE == QK_ANGLE_INV_FREQ);

static_assert(kHeadDim >= 2 && kHeadDim <= QK_MAX_HEAD_DIM && kHeadDim % 2 == 0, "head_dim");
static_assert(kRotary >= 0 && kRotary <= kHeadDim && kRotary % 2 == 0, "rotary_dim");
static_assert((QK_ANGLE == QK_ANGLE_NONE) == (kRotary == 0), "angle source");

// The channels of pair j. The rotated pairs come first; the rest of the head is paired for company,
// at the rotated pairs' distance where whole blocks of them fill it, so that a lane's two runs lie
// as far apart in every lane.
constexpr bool kBlocked = kPartly && kHeadDim % (kPartly ? kRotary : 1) == 0;

__device__ __forceinline__ int channel_a(int j) {
  if (!kHalf) return 2 * j;
  if (kBlocked) return j + j / (kRotatedPairs > 0 ? kRotatedPairs : 1) * kRotatedPairs;
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

}  // namespace
