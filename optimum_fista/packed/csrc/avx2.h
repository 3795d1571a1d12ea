// x86 with AVX2, FMA and F16C: 8 weights at a time are put in place by a shuffle from a table of all bytes of a mask.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "matrix.h"
#include "numbers.h"

namespace fista::avx2 {

#define TARGET __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2")))
#define INLINE TARGET __attribute__((always_inline)) static inline
#define PREFETCH(address) _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0)

struct Table {
  int8_t lane[256][8];       // which value goes to each lane, -1 = none
  uint8_t bytes[256][16];    // the same for bytes of values of 16 bits, 0x80 = none

  constexpr Table() : lane(), bytes() {
    for (int mask = 0; mask < 256; mask++)
      for (int i = 0, next = 0; i < 8; i++) {
        const bool kept = mask >> i & 1;
        lane[mask][i] = kept ? next : -1;
        bytes[mask][2 * i] = kept ? 2 * next : 0x80;
        bytes[mask][2 * i + 1] = kept ? 2 * next + 1 : 0x80;
        next += kept;
      }
  }
};

alignas(64) constexpr Table kTable;

INLINE __m128i expand_words(const void* values, uint64_t bits) {
  return _mm_shuffle_epi8(_mm_loadu_si128(static_cast<const __m128i*>(values)),
                          _mm_load_si128(reinterpret_cast<const __m128i*>(kTable.bytes[bits])));
}

INLINE __m256 expand(const BFloat16* values, uint64_t bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(expand_words(values, bits)), 16));
}

INLINE __m256 expand(const Float16* values, uint64_t bits) { return _mm256_cvtph_ps(expand_words(values, bits)); }

INLINE __m256 expand(const Float32* values, uint64_t bits) {
  const __m256i lane = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTable.lane[bits])));
  const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_srai_epi32(lane, 31), _mm256_permutevar8x32_epi32(loaded, lane)));
}

template <class T> struct Lanes {
  using Weight = T;
  using Input = float;
  static constexpr int kStep = 8, kSums = 12;
  struct Weights { __m256 lanes; };
  struct Sums { __m256 lanes; };

  INLINE Weights expand(const T* values, uint64_t bits) { return {avx2::expand(values, bits)}; }
  INLINE void add(Sums& sums, const Weights& weights, const float* x) {
    sums.lanes = _mm256_fmadd_ps(weights.lanes, _mm256_loadu_ps(x), sums.lanes);
  }
  INLINE float total(const Sums& sums) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums.lanes), _mm256_extractf128_ps(sums.lanes, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
};

#include "rows.inl"

#undef TARGET
#undef INLINE
#undef PREFETCH

}  // namespace fista::avx2
