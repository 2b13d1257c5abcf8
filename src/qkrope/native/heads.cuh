// heads.cuh: how the general kernels read and write a lane's share of a head: where channels.cuh
// says that its pairs lie.
#include "options.cuh"

namespace {

// A lane's share of a head as it lies in memory.
template <int kBytes>
struct Row {
  static constexpr int kSize = QK_DTYPE == QK_F32 ? 4 : 2;
  static constexpr int kWords = kCount * 2 * kSize / 4;
  unsigned words[kWords];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }
  __device__ __forceinline__ void fill_ones() {
    constexpr unsigned kOne = QK_DTYPE == QK_F32    ? 0x3f800000u
                              : QK_DTYPE == QK_BF16 ? 0x3f803f80u
                                                    : 0x3c003c00u;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = kOne;
  }
  __device__ __forceinline__ void load(const char* from, int first) {
    if constexpr (kBytes > 0 && kTwoRuns) {
      load_run<kWords / 2, kBytes>(from + in_a(first) * kSize, words);
      load_run<kWords / 2, kBytes>(from + in_b(first) * kSize, words + kWords / 2);
    } else if constexpr (kBytes > 0) {
      load_run<kWords, kBytes>(from + in_a(first) * kSize, words);
    } else {
      clear();
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (!is_there(first, i)) continue;
        put(i, from, in_a(first + i)), put(kCount + i, from, in_b(first + i));
      }
    }
  }
  // The channels that pairs are written to, or (kMove false) read from.
  template <bool kMove>
  __device__ __forceinline__ static Values read(const char* from, int first) {
    Values v;
    if constexpr (kBytes > 0) {
      unsigned words[kWords];
      const bool two = kTwoRuns || (kMove && rotated(first));
      if (two) {
        load_run<kWords / 2, kBytes>(from + out_a<kMove>(first) * kSize, words);
        load_run<kWords / 2, kBytes>(from + out_b<kMove>(first) * kSize, words + kWords / 2);
      } else {
        load_run<kWords, kBytes>(from + out_a<kMove>(first) * kSize, words);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        v.a[i] = two ? element<QK_DTYPE>(words, i) : element<QK_DTYPE>(words, 2 * i);
        v.b[i] = two ? element<QK_DTYPE>(words, kCount + i) : element<QK_DTYPE>(words, 2 * i + 1);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const bool there = is_there(first, i);
        v.a[i] = there ? table_value(from, QK_DTYPE, out_a<kMove>(first + i)) : 0.0f;
        v.b[i] = there ? table_value(from, QK_DTYPE, out_b<kMove>(first + i)) : 0.0f;
      }
    }
    return v;
  }
  __device__ __forceinline__ Values values() const {
    constexpr bool kInOrder = kBytes > 0 && !kTwoRuns;
    Values v;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v.a[i] = element<QK_DTYPE>(words, kInOrder ? 2 * i : i);
      v.b[i] = element<QK_DTYPE>(words, kInOrder ? 2 * i + 1 : kCount + i);
    }
    return v;
  }
  template <bool kMove>
  __device__ __forceinline__ static void store(char* to, int first, const Values& v) {
    if constexpr (kBytes > 0) {
      unsigned out[kWords];
      if (kTwoRuns || (kMove && rotated(first))) {
        pack(out, [&](int e) { return e < kCount ? v.a[e % kCount] : v.b[e % kCount]; });
        store_run<kWords / 2, kBytes>(to + out_a<kMove>(first) * kSize, out);
        store_run<kWords / 2, kBytes>(to + out_b<kMove>(first) * kSize, out + kWords / 2);
      } else {
        pack(out, [&](int e) { return e % 2 ? v.b[e / 2] : v.a[e / 2]; });
        store_run<kWords, kBytes>(to + out_a<kMove>(first) * kSize, out);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (!is_there(first, i)) continue;
        take(v.a[i], to, out_a<kMove>(first + i)), take(v.b[i], to, out_b<kMove>(first + i));
      }
    }
  }

 private:
  template <typename Element>
  __device__ __forceinline__ static void pack(unsigned (&out)[kWords], Element&& element_of) {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      out[i] = kSize == 4 ? __float_as_uint(element_of(i))
                          : narrow_pair<QK_DTYPE>(element_of(2 * i % (2 * kCount)),
                                                  element_of((2 * i + 1) % (2 * kCount)));
  }
  __device__ __forceinline__ void put(int e, const char* from, int channel) {
    if (kSize == 4)
      words[e * kSize / 4] = ((const unsigned*)from)[channel];
    else
      words[e / 2] |= (unsigned)((const unsigned short*)from)[channel] << (e % 2 * 16);
  }
  __device__ __forceinline__ static void take(float x, char* to, int channel) {
    if (kSize == 4)
      ((float*)to)[channel] = x;
    else
      ((unsigned short*)to)[channel] = (unsigned short)narrow_pair<QK_DTYPE>(x, x);
  }
};

}  // namespace
