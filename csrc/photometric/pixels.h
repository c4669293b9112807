// Pixels of three bytes, taken apart into vectors of their channels.
#pragma once

#include "common/simd.h"

namespace CPU_TARGET {

struct Pixels {
  vec<float> red, green, blue;
};

constexpr int kOverread = 4;  // bytes past the last pixel that load_pixels may read

// As many pixels as a vector has lanes. A lane's four bytes hold a pixel: red is the lowest, the highest is undefined.
template <bool backwards>
ALWAYS_INLINE vec<uint32_t> load_pixels(const uint8_t* p) {
#if defined(__AVX2__)
  // Four pixels at a time: a load of 16 bytes, 12 of them pixels, and a shuffle that spreads them.
  constexpr int groups = lanes<float> / 4;
  const auto group = [&](int i) {
    const uint8_t* first = p + 12 * (backwards ? groups - 1 - i : i);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
  };
  const __m128i spread = backwards ? _mm_setr_epi8(9, 10, 11, -1, 6, 7, 8, -1, 3, 4, 5, -1, 0, 1, 2, -1)
                                   : _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(group(0)), group(1), 1);
#if defined(__AVX512F__)
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(group(2)), group(3), 1);
  const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  return (vec<uint32_t>)_mm512_shuffle_epi8(all, _mm512_broadcast_i32x4(spread));
#else
  return (vec<uint32_t>)_mm256_shuffle_epi8(low, _mm256_broadcastsi128_si256(spread));
#endif
#else
  vec<uint32_t> pixels;
  for (int i = 0; i < lanes<float>; ++i) {
    const uint8_t* pixel = p + 3 * (backwards ? lanes<float> - 1 - i : i);
    pixels[i] = pixel[0] | pixel[1] << 8 | pixel[2] << 16;
  }
  return pixels;
#endif
}

// The channels of the pixels that begin at p, in order or reversed.
template <bool backwards>
ALWAYS_INLINE Pixels unpack(const uint8_t* p) {
  const vec<uint32_t> pixels = load_pixels<backwards>(p);
  const auto channel = [&](int shift) {
    return __builtin_convertvector((vec<int32_t>)(pixels >> shift & 255), vec<float>);
  };
  return {channel(0), channel(8), channel(16)};
}

}  // namespace CPU_TARGET
