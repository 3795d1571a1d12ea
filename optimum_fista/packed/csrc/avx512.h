// x86 with AVX-512 F, BW, VL, VBMI2 and BF16: 32 weights of 16 bits are put in place by one instruction.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "matrix.h"
#include "numbers.h"

namespace fista::avx512 {

#define TARGET \
  __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16")))
#define INLINE TARGET __attribute__((always_inline)) static inline
#define PREFETCH(address) _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0)

// The load stays an instruction of its own: an expansion straight from memory is many times slower on AMD, and inputs
// are loaded once for all rows where there are registers left.
INLINE __m512i load(const void* values) {
  __m512i loaded = _mm512_loadu_si512(values);
  __asm__("" : "+v"(loaded));
  return loaded;
}

INLINE __m512i expand_words(const void* values, uint64_t bits) {
  return _mm512_maskz_expand_epi16(__mmask32(bits), load(values));
}

struct FloatSums { __m512 lane; };

template <int kStep> INLINE uint64_t part_of(uint64_t word, int step) {
  return word >> (step * kStep) & ((uint64_t(1) << kStep) - 1);
}

struct BFloat16Lanes {
  using Weight = BFloat16;
  using Input = BFloat16;
  static constexpr int kStep = 32, kSums = 32, kRows = 4, kStreams = 2, kInputs = 8;
  struct Weights { __m512i lanes; };
  using Sums = FloatSums;

  INLINE uint64_t part(uint64_t word, int step) { return part_of<kStep>(word, step); }
  INLINE Weights expand(const BFloat16* values, uint64_t bits) { return {expand_words(values, bits)}; }
  template <int kHeld> INLINE __m512i inputs(const BFloat16* x) { return kHeld < 28 ? load(x) : _mm512_loadu_si512(x); }
  INLINE void add(Sums& sums, const Weights& weights, const __m512i& inputs) {
    sums.lane = _mm512_dpbf16_ps(sums.lane, (__m512bh)weights.lanes, (__m512bh)inputs);
  }
  INLINE float total(const Sums& sums) { return _mm512_reduce_add_ps(sums.lane); }
};

struct Float16Lanes {
  using Weight = Float16;
  using Input = float;
  static constexpr int kStep = 32, kSums = 24, kRows = 4, kStreams = 4, kInputs = 8;
  struct Weights { __m512 low, high; };
  using Sums = FloatSums;

  INLINE uint64_t part(uint64_t word, int step) { return part_of<kStep>(word, step); }
  INLINE Weights expand(const Float16* values, uint64_t bits) {
    const __m512i words = expand_words(values, bits);
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(words)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1))};
  }
  template <int> INLINE const float* inputs(const float* x) { return x; }
  INLINE void add(Sums& sums, const Weights& weights, const float* x) {
    sums.lane = _mm512_fmadd_ps(weights.low, _mm512_loadu_ps(x), sums.lane);
    sums.lane = _mm512_fmadd_ps(weights.high, _mm512_loadu_ps(x + 16), sums.lane);
  }
  INLINE float total(const Sums& sums) { return _mm512_reduce_add_ps(sums.lane); }
};

struct Float32Lanes {
  using Weight = Float32;
  using Input = float;
  static constexpr int kStep = 16, kSums = 24, kRows = 4, kStreams = 4, kInputs = 8;
  struct Weights { __m512 lanes; };
  using Sums = FloatSums;

  INLINE uint64_t part(uint64_t word, int step) { return part_of<kStep>(word, step); }
  INLINE Weights expand(const Float32* values, uint64_t bits) {
    return {_mm512_maskz_expand_ps(__mmask16(bits), _mm512_castsi512_ps(load(values)))};
  }
  template <int> INLINE __m512 inputs(const float* x) { return _mm512_castsi512_ps(load(x)); }
  INLINE void add(Sums& sums, const Weights& weights, const __m512& inputs) {
    sums.lane = _mm512_fmadd_ps(weights.lanes, inputs, sums.lane);
  }
  INLINE float total(const Sums& sums) { return _mm512_reduce_add_ps(sums.lane); }
};

template <class T> struct LanesOf;
template <> struct LanesOf<BFloat16> { using type = BFloat16Lanes; };
template <> struct LanesOf<Float16> { using type = Float16Lanes; };
template <> struct LanesOf<Float32> { using type = Float32Lanes; };
template <class T> using Lanes = typename LanesOf<T>::type;

#include "rows.inl"

INLINE void store(uint16_t* dense, uint64_t bits, const uint16_t* values, int64_t left, __mmask32 room) {
  const __mmask32 there = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
  _mm512_mask_storeu_epi16(dense, room, _mm512_maskz_expand_epi16(__mmask32(bits), _mm512_maskz_loadu_epi16(there, values)));
}

INLINE void store(uint32_t* dense, uint64_t bits, const uint32_t* values, int64_t left, __mmask16 room) {
  const __mmask16 there = left >= 16 ? ~__mmask16(0) : (__mmask16(1) << left) - 1;
  _mm512_mask_storeu_epi32(dense, room, _mm512_maskz_expand_epi32(__mmask16(bits), _mm512_maskz_loadu_epi32(there, values)));
}

// One dense row out of `left` values, those of the row and all after it; returns where the row's end.
template <class T>
TARGET const T* unpack_row(const T* values, int64_t left, const uint8_t* mask, T* dense, int64_t columns) {
  using Word = decltype(T::bits);
  constexpr int kStep = 64 / sizeof(T);
  for (int64_t start = 0; start < columns; start += kStep) {
    uint64_t bits = 0;
    std::memcpy(&bits, mask + start / 8, kStep / 8);
    const uint64_t room = columns - start >= kStep ? ~uint64_t(0) : (uint64_t(1) << (columns - start)) - 1;
    store(reinterpret_cast<Word*>(dense + start), bits, reinterpret_cast<const Word*>(values), left, room);
    const int kept = __builtin_popcountll(bits & room);
    values += kept;
    left -= kept;
  }
  return values;
}

#undef TARGET
#undef INLINE
#undef PREFETCH

}  // namespace fista::avx512
