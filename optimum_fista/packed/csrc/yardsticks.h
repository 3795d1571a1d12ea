// What packed products are measured against: dense bfloat16 rows read the same way, and memory that is only read.
#pragma once

#include <immintrin.h>

#include <vector>

#include "matrix.h"
#include "numbers.h"

namespace fista::yardsticks {

namespace avx512 {

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

// Rows first to last - 1 of a dense matrix times one input; columns a multiple of 64. R rows are read side by side.
template <int R>
TARGET void dense_rows(const uint16_t* weight, const uint16_t* x, uint16_t* y, int64_t columns, int64_t first,
                       int64_t last) {
  const int64_t apart = (last - first) / R;
  for (int64_t row = first; row < first + apart; row++) {
    __m512 sums[R][2] = {};
    for (int64_t column = 0; column < columns; column += 64) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __m512bh input = (__m512bh)_mm512_loadu_si512(x + column + 32 * half);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const uint16_t* place = weight + (row + r * apart) * columns + column + 32 * half;
          _mm_prefetch(reinterpret_cast<const char*>(place) + 1024, _MM_HINT_T0);
          sums[r][half] = _mm512_dpbf16_ps(sums[r][half], (__m512bh)_mm512_loadu_si512(place), input);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      y[row + r * apart] = narrow<BFloat16>(_mm512_reduce_add_ps(_mm512_add_ps(sums[r][0], sums[r][1]))).bits;
  }
  if constexpr (R > 1) dense_rows<1>(weight, x, y, columns, first + R * apart, last);
}

// The exclusive or of `bytes` bytes, a multiple of 512, in four runs like those of the products.
TARGET inline int64_t read(const char* data, int64_t bytes) {
  __m512i sums[4] = {};
  for (int64_t at = 0; at < bytes / 4; at += 128)
#pragma GCC unroll 4
    for (int run = 0; run < 4; run++)
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        const char* place = data + run * (bytes / 4) + at + 64 * i;
        _mm_prefetch(place + 1024, _MM_HINT_T0);
        sums[run] = _mm512_xor_si512(sums[run], _mm512_loadu_si512(place));
      }
  return _mm512_reduce_add_epi64(
      _mm512_xor_si512(_mm512_xor_si512(sums[0], sums[1]), _mm512_xor_si512(sums[2], sums[3])));
}

#undef TARGET

}  // namespace avx512

namespace avx2 {

#define TARGET __attribute__((target("avx2,fma")))

// As above. `x` is the input in float32: in each run of 16 columns those of even places come first, then those of odd.
template <int R>
TARGET void dense_rows(const uint16_t* weight, const float* x, uint16_t* y, int64_t columns, int64_t first,
                       int64_t last) {
  const int64_t apart = (last - first) / R;
  const __m256i high = _mm256_set1_epi32(int(0xffff0000));
  for (int64_t row = first; row < first + apart; row++) {
    __m256 sums[R][2] = {};
    for (int64_t column = 0; column < columns; column += 16) {
      const __m256 even = _mm256_loadu_ps(x + column), odd = _mm256_loadu_ps(x + column + 8);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const uint16_t* place = weight + (row + r * apart) * columns + column;
        _mm_prefetch(reinterpret_cast<const char*>(place) + 1024, _MM_HINT_T0);
        const __m256i two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place));
        sums[r][0] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(two, 16)), even, sums[r][0]);
        sums[r][1] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(two, high)), odd, sums[r][1]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      alignas(32) float lanes[8];
      _mm256_store_ps(lanes, _mm256_add_ps(sums[r][0], sums[r][1]));
      float total = 0;
      for (float lane : lanes) total += lane;
      y[row + r * apart] = narrow<BFloat16>(total).bits;
    }
  }
  if constexpr (R > 1) dense_rows<1>(weight, x, y, columns, first + R * apart, last);
}

inline std::vector<float> evens_and_odds(const uint16_t* x, int64_t columns) {
  std::vector<float> parted(columns);
  for (int64_t column = 0; column < columns; column++)
    parted[column / 16 * 16 + column % 2 * 8 + column % 16 / 2] = widen(BFloat16{x[column]});
  return parted;
}

TARGET inline int64_t read(const char* data, int64_t bytes) {
  __m256i sums[4] = {};
  for (int64_t at = 0; at < bytes / 4; at += 64)
#pragma GCC unroll 4
    for (int run = 0; run < 4; run++)
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        const char* place = data + run * (bytes / 4) + at + 32 * i;
        _mm_prefetch(place + 1024, _MM_HINT_T0);
        sums[run] = _mm256_xor_si256(sums[run], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)));
      }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
  return _mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 1) ^ _mm256_extract_epi64(all, 2) ^
         _mm256_extract_epi64(all, 3);
}

#undef TARGET

}  // namespace avx2

}  // namespace fista::yardsticks
