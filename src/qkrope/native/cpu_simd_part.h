// cpu_simd_part.h: the first bytes of a 256-bit vector, for the last part of a row.
#ifndef QKROPE_CPU_SIMD_PART_H
#define QKROPE_CPU_SIMD_PART_H

#include <immintrin.h>

namespace qk {
namespace {

inline __m256i load_all(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

// The first `bytes` (even; none if negative, all from 32 on) and zeros; nothing else is read.
inline __m256i load_part(const char* p, int bytes) {
  static const int ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  if (bytes >= 32) return load_all(p);
  if (bytes <= 0) return _mm256_setzero_si256();
  int whole = bytes / 4;
  __m256i v = _mm256_maskload_epi32(reinterpret_cast<const int*>(p), load_all(ones + 8 - whole));
  if (bytes % 4 == 0) return v;
  unsigned short last;
  __builtin_memcpy(&last, p + 4 * whole, 2);
  __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i lane = _mm256_cmpeq_epi32(lanes, _mm256_set1_epi32(whole));
  return _mm256_or_si256(v, _mm256_and_si256(lane, _mm256_set1_epi32(last)));
}

// The counterpart, in pieces of a power of two bytes: a masked store is slow on some machines, and
// on all of them it holds up loads of the bytes that it does not write.
inline void store_part(char* p, __m256i v, int bytes) {
  if (bytes >= 32) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  if (bytes <= 0) return;
  __m128i x = _mm256_castsi256_si128(v);
  if (bytes & 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
    x = _mm256_extracti128_si256(v, 1), p += 16;
  }
  if (bytes & 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), x);
    x = _mm_srli_si128(x, 8), p += 8;
  }
  unsigned long long rest = _mm_cvtsi128_si64(x);
  if (bytes & 4) {
    __builtin_memcpy(p, &rest, 4);
    rest >>= 32, p += 4;
  }
  if (bytes & 2) __builtin_memcpy(p, &rest, 2);
}

}  // namespace
}  // namespace qk
#endif
