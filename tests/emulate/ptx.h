// ptx.h: in the place of ptx.cuh.
namespace {

inline float widen_half(unsigned short bits) {
  const unsigned sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  float size = __uint_as_float(rest) * 0x1p112f;
  if (rest >= 0x0f800000u) size = __uint_as_float(rest | 0x7f800000u);
  return __uint_as_float(__float_as_uint(size) | sign);
}

inline unsigned half_of(float x) { return bits_as<unsigned short>((_Float16)x); }
inline unsigned narrow_to_halves(float low, float high) {
  return half_of(low) | half_of(high) << 16;
}

inline unsigned bfloat_of(float x) {
  const unsigned bits = __float_as_uint(x);
  return x == x ? (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16 : 0x7fffu;
}
inline unsigned narrow_to_bfloats(float low, float high) {
  return bfloat_of(low) | bfloat_of(high) << 16;
}

// The hardware's error is below 4.4e-7, and about this on the whole.
inline void sincos_by_hardware(float x, float& s, float& c) {
  s = (float)std::sin((double)x), c = (float)std::cos((double)x);
  s += 1.2e-7f, c -= 1.2e-7f;
}

inline void release_next() {}
inline void wait_for_previous() {}
inline void fetch_into_l2(const char*) {}
inline void settle(float&) {}
inline void settle(const char*&) {}

}  // namespace
