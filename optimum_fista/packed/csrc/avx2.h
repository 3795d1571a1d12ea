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

// By eight bits of a mask: where the lanes come from. A part is those bits times the 32 bytes of an entry.
struct Table {
  int32_t lanes[256][8];         // which value of 32 bits goes to each lane, negative = none
  uint8_t high_halves[256][32];  // values of 16 bits to the high halves of lanes, from two copies of them; 0x80 = zero
  uint8_t words[256][32];        // values of 16 bits side by side, in the first half

  constexpr Table() : lanes(), high_halves(), words() {
    for (int mask = 0; mask < 256; mask++)
      for (int i = 0, next = 0; i < 8; i++) {
        const bool kept = mask >> i & 1;
        lanes[mask][i] = kept ? next : -1;
        for (int byte = 0; byte < 2; byte++) {
          high_halves[mask][4 * i + byte] = 0x80;
          high_halves[mask][4 * i + 2 + byte] = words[mask][2 * i + byte] = kept ? 2 * next + byte : 0x80;
        }
        next += kept;
      }
  }
};

alignas(64) constexpr Table kTable;

INLINE uint64_t part_of(uint64_t word, int step) { return (step ? word >> (8 * step - 5) : word << 5) & 0xff << 5; }

INLINE __m256i entry(const void* table, uint64_t part) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(table) + part));
}

INLINE __m256 expand(const BFloat16* values, uint64_t part) {
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, entry(kTable.high_halves, part)));
}

INLINE __m256 expand(const Float16* values, uint64_t part) {
  const __m128i order = _mm256_castsi256_si128(entry(kTable.words, part));
  return _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), order));
}

INLINE __m256 expand(const Float32* values, uint64_t part) {
  const __m256i lanes = entry(kTable.lanes, part);
  const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(values)), lanes);
  return _mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
}

template <class T> struct Lanes {
  using Weight = T;
  using Input = float;
  static constexpr int kStep = 8, kSums = 12, kRows = 2, kStreams = 2, kInputs = 6;
  struct Weights { __m256 lanes; };
  struct Sums { __m256 lanes; };

  INLINE uint64_t part(uint64_t word, int step) { return part_of(word, step); }
  INLINE Weights expand(const T* values, uint64_t part) { return {avx2::expand(values, part)}; }
  template <int> INLINE __m256 inputs(const float* x) {
    __m256 loaded = _mm256_loadu_ps(x);
    __asm__("" : "+x"(loaded));  // once for all rows: loads are what limits this path
    return loaded;
  }
  INLINE void add(Sums& sums, const Weights& weights, const __m256& inputs) {
    sums.lanes = _mm256_fmadd_ps(weights.lanes, inputs, sums.lanes);
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
