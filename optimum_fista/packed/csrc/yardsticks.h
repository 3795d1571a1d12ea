// What packed products are measured against: dense bfloat16 rows read the same way, and memory that is only read.
#pragma once

#include <immintrin.h>

#include "matrix.h"
#include "numbers.h"

namespace fista::yardsticks {

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

}  // namespace fista::yardsticks
