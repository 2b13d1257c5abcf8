// rows.cuh: where the channels of a head lie among the lanes, and how a lane's share of a row is
// read, summed and written. The variant's macros come before it (see kernel.cu).
#include "lanes.cuh"

namespace {

// No lane holds rotated and unrotated pairs both.
constexpr bool kWholeLanes = kRotatedPairs % kCount == 0;

constexpr bool kNormed = QK_Q_NORM == QK_NORM_RMS || QK_K_NORM == QK_NORM_RMS;
// Where every channel turns, attention factor and a bad position's NaN go with the row's scale,
// which a gradient has none of.
constexpr bool kScaled = !QK_BACKWARD && kRotary == kHeadDim && kNormed &&
                         (QK_ANGLE == QK_ANGLE_PHASE || QK_ANGLE == QK_ANGLE_INV_FREQ);

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
  // Bytes from a lane's a channels to its b channels: a constant for a fully rotated head.
  __device__ __forceinline__ static int apart(int first) {
    if (kRotary == 0 || kRotary == kHeadDim) return kPairs * kSize;
    if (kBlocked) return kRotatedPairs * kSize;
    return (first < kRotatedPairs ? kRotatedPairs : kPairs - kRotatedPairs) * kSize;
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

// A lane's runs are aligned and consecutive where both halves of the rotated part and of the rest
// are whole numbers of them.
[[maybe_unused]] constexpr bool kRuns =
    QK_UNITS(kHeadDim) % kUnits == 0 &&
    (kHalf ? kRotatedPairs % kCount == 0 && kPairs % kCount == 0 : kHeadDim % 8 == 0);

}  // namespace
