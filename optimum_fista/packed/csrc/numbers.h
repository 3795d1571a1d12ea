// The three dtypes, and their conversions to and from float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace fista {

struct Float32 { uint32_t bits; };
struct Float16 { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(Float32 x) { return from_bits(x.bits); }
inline float widen(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }

inline float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Subnormals included: the exponent of float32 is rebased by a product that is exact.
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * from_bits(0x77800000)));
}

// Round to nearest, ties to even.
template <class T> T narrow(float x);

template <> inline Float32 narrow<Float32>(float x) { return {to_bits(x)}; }

template <> inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = to_bits(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <> inline Float16 narrow<Float16>(float x) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x38800000)  // subnormal: adding 0.5 leaves the rounded result in the lowest bits
    return {uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000))};
  return {uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

}  // namespace fista
