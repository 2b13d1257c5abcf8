// lanes.cuh: how lanes share a head, and the elements they read, write and sum: what every kernel
// has in common. The variant's macros come before it.
#include "math.h"
#include "params.h"
#include "ptx.cuh"

#ifndef QK_BACKWARD
#define QK_BACKWARD 0
#endif

namespace {

constexpr int kHeadDim = QK_HEAD_DIM, kRotary = QK_ROTARY_DIM;
constexpr int kPairs = kHeadDim / 2, kRotatedPairs = kRotary / 2;
[[maybe_unused]] constexpr bool kHalf = QK_PAIRING == QK_HALF;
constexpr int kUnits = QK_LANE_UNITS(kHeadDim);
constexpr int kLanes = QK_LANES(kHeadDim);
constexpr int kGroups = QK_GROUPS(kHeadDim);
[[maybe_unused]] constexpr int kPasses = QK_PASSES(kHeadDim);
constexpr int kCount = kUnits * 4;  // pairs a lane
// Frequencies are held from before the wait, except where that would cost a spill.
[[maybe_unused]] constexpr bool kEarlyFrac = kUnits != 2;
[[maybe_unused]] constexpr bool kPowerOfTwo = (kLanes & (kLanes - 1)) == 0;
[[maybe_unused]] constexpr bool kPartly = kRotary > 0 && kRotary < kHeadDim;
constexpr unsigned kAllLanes = 0xffffffffu;

static_assert(kHeadDim >= 2 && kHeadDim <= QK_MAX_HEAD_DIM && kHeadDim % 2 == 0, "head_dim");
static_assert(kRotary >= 0 && kRotary <= kHeadDim && kRotary % 2 == 0, "rotary_dim");
static_assert((QK_ANGLE == QK_ANGLE_NONE) == (kRotary == 0), "angle source");

#define QK_NAN __int_as_float(0x7fffffff)

// ---- elements ---------------------------------------------------------------------------------

template <int kType>
__device__ __forceinline__ float widen_half_word(unsigned word, bool high) {
  if (kType == QK_BF16) return __uint_as_float(high ? word & 0xffff0000u : word << 16);
  return widen_half((unsigned short)(high ? word >> 16 : word));
}

template <int kType>
__device__ __forceinline__ float element(const unsigned* words, int e) {
  if (kType == QK_F32) return __uint_as_float(words[e]);
  return widen_half_word<kType>(words[e / 2], e & 1);
}

// Two floats rounded to nearest even, the first in the low half.
template <int kType>
__device__ __forceinline__ unsigned narrow_pair(float low, float high) {
  return kType == QK_F16 ? narrow_to_halves(low, high) : narrow_to_bfloats(low, high);
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

__device__ __forceinline__ float table_value(const void* table, int type, long long at) {
  if (type == QK_F32) return ((const float*)table)[at];
  unsigned word = ((const unsigned short*)table)[at];
  return type == QK_BF16 ? widen_half_word<QK_BF16>(word, false)
                         : widen_half_word<QK_F16>(word, false);
}

// Sums over the lanes of a group, for kRows rows at once; every lane gets them. The tree is that of
// kLanes rounded up to a power of two with zeros, whatever the lanes hold. Two of its levels at a
// time for a row alone: three exchanges on their way together are there sooner than two in turn.
template <int kRows>
__device__ __forceinline__ void group_sums(float (&sums)[kRows], int base, int rank) {
  int step = 1;
#pragma unroll
  for (; kPowerOfTwo && kRows == 1 && 4 * step <= kLanes; step *= 4) {
    const float sum = sums[0], one = __shfl_xor_sync(kAllLanes, sum, step);
    const float two = __shfl_xor_sync(kAllLanes, sum, 2 * step);
    const float three = __shfl_xor_sync(kAllLanes, sum, 3 * step);
    sums[0] = qk::add(qk::add(sum, one), qk::add(two, three));
  }
#pragma unroll
  for (; step < kLanes; step *= 2) {
    const int from = (rank ^ step) & ~(step - 1);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (kPowerOfTwo) {
        sums[i] = qk::add(sums[i], __shfl_xor_sync(kAllLanes, sums[i], step));
      } else {
        const float other = __shfl_sync(kAllLanes, sums[i], base + from);
        sums[i] = qk::add(sums[i], from < kLanes ? other : 0.0f);
      }
    }
  }
}

}  // namespace
