// Many inputs in bfloat16 with AVX-512: blocks of rows are unpacked into the cache and multiplied as dense ones.
//
// The inputs are the lanes of a register: a pair of columns of 16 inputs is multiplied by the same pair of one row,
// broadcast. Sums stay in registers over the columns of a block.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "avx512.h"
#include "matrix.h"
#include "numbers.h"
#include "threads.h"

namespace fista::avx512 {

#define TARGET \
  __attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16")))
#define INLINE TARGET __attribute__((always_inline)) static inline

namespace blocks {

constexpr int64_t kRows = 48;                                             // of a block
constexpr int64_t kWords = 8, kColumns = 64 * kWords;                     // of a block
constexpr int64_t kInputs = 48;                                           // of a tile, three registers
constexpr int64_t kMostInputs = 512;                                      // at a time
constexpr int64_t kPitch = kColumns + 32, kSumsPitch = kMostInputs + 16;  // so that rows are not a power of two apart
constexpr int64_t kLinesOfRow = 10, kLines = 512;  // to bring near, of a row's values and mask, and of a block

struct alignas(64) Scratch {
  uint16_t weights[kRows * kPitch];
  float sums[kRows * kSumsPitch];
  const char* lines[kLines];
};

static_assert(kRows * kLinesOfRow <= kLines && kLines % (kColumns / 2) == 0);

// What is read soon, to be brought near while tiles are multiplied, a line a pair of columns: first the next values of
// the rows, then the next tile of inputs.
struct Ahead {
  const char* const* lines;
  int64_t count;
  const uint32_t* inputs;
};

INLINE void transpose(__m512i (&rows)[16]) {
  __m512i halves[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    halves[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    halves[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(halves[i + j], halves[i + 2 + j]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(halves[i + j], halves[i + 2 + j]);
    }
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      halves[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0x88);
      halves[i + 4 + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0xdd);
    }
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) {
    rows[j] = _mm512_shuffle_i32x4(halves[j], halves[8 + j], 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(halves[j], halves[8 + j], 0xdd);
  }
}

// Registers of the tile of `count` inputs that starts at `input`, and where the tile's pairs of a word start.
INLINE int64_t registers_of(int64_t count, int64_t input) { return std::min<int64_t>(3, (count - input + 15) / 16); }

template <class T> T* tile_of(T* arranged, int64_t count, int64_t words, int64_t input, int64_t word) {
  return arranged + (input * words + word * 16 * std::min<int64_t>(3, (count - input + 15) / 16)) * 32;
}

// Words first to last - 1 of `count` inputs x [count, columns] as [tiles][pairs of columns][16 lanes a register][2],
// zeros after the columns and the inputs; pairs of a tile lie for all words together.
TARGET inline void arrange(const uint16_t* x, int64_t count, int64_t columns, int64_t words, int64_t first,
                           int64_t last, uint32_t* arranged) {
  for (int64_t input = 0; input < count; input += 16) {
    const int64_t tile = input / kInputs * kInputs, lanes = 16 * registers_of(count, tile);
    for (int64_t half = 2 * first; half < 2 * last; half++) {
      const int64_t left = std::max<int64_t>(0, columns - 32 * half);
      const __mmask32 there = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
      __m512i rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        rows[i] = input + i < count ? _mm512_maskz_loadu_epi16(there, x + (input + i) * columns + 32 * half)
                                    : _mm512_setzero_si512();
      transpose(rows);
      uint32_t* to = arranged + tile * words * 32 + half * 16 * lanes + (input - tile);
#pragma GCC unroll 16
      for (int pair = 0; pair < 16; pair++) _mm512_storeu_si512(to + pair * lanes, rows[pair]);
    }
  }
}

INLINE __m512i load_some(const uint16_t* values, int64_t count) {
  return _mm512_maskz_loadu_epi16(count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1, values);
}

// The next `words` words of one row, dense; returns where the values of the next words begin.
TARGET inline const uint16_t* unpack(const uint16_t* values, const uint16_t* end, const uint8_t* mask, int64_t words,
                                     uint16_t* dense) {
  for (int64_t word = 0; word < words; word++, dense += 64) {
    uint64_t bits;
    std::memcpy(&bits, mask + 8 * word, 8);
    const uint16_t* second = values + __builtin_popcount(uint32_t(bits));
    const bool all = end - values >= 64;
    const __m512i low = all ? load(values) : load_some(values, end - values);
    const __m512i high = all ? load(second) : load_some(second, end - second);
    _mm512_store_si512(dense, _mm512_maskz_expand_epi16(__mmask32(bits), low));
    _mm512_store_si512(dense + 32, _mm512_maskz_expand_epi16(__mmask32(bits >> 32), high));
    values += __builtin_popcountll(bits);
  }
  return values;
}

// Adds R rows of a block times 16 V inputs to their sums.
template <int R, int V, class Line>
TARGET void multiply_tile(const uint16_t* weights, const uint32_t* x, const Line* next, int64_t pairs, float* to) {
  __m512 sums[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; r++)
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) sums[r][v] = _mm512_load_ps(to + r * kSumsPitch + 16 * v);
  for (int64_t pair = 0; pair < pairs; pair++, x += 16 * V, weights += 2) {
    const void* line;
    if constexpr (std::is_same_v<Line, uint32_t>) line = next + 16 * pair;
    else line = next[pair];
    _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T1);
    __m512i inputs[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) inputs[v] = _mm512_loadu_si512(x + 16 * v);
#pragma GCC unroll 24
    for (int r = 0; r < R; r++) {
      int32_t two;
      std::memcpy(&two, weights + r * kPitch, 4);
      const __m512i weight = _mm512_set1_epi32(two);
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)inputs[v], (__m512bh)weight);
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; r++)
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) _mm512_store_ps(to + r * kSumsPitch + 16 * v, sums[r][v]);
}

template <int R, int V>
TARGET void multiply_rows_of_tile(const uint16_t* weights, const uint32_t* x, int64_t pairs, Ahead& ahead, float* to) {
  if (ahead.count >= pairs) {
    multiply_tile<R, V>(weights, x, ahead.lines, pairs, to);
    ahead.lines += pairs;
    ahead.count -= pairs;
  } else {
    multiply_tile<R, V>(weights, x, ahead.inputs, pairs, to);
    ahead.inputs += 16 * pairs;
  }
}

template <int R, int V>
TARGET void multiply_tiles(const uint16_t* weights, int64_t rows, const uint32_t* x, int64_t pairs, Ahead& ahead,
                           float* to) {
  int64_t row = 0;
  for (; row + R <= rows; row += R)
    multiply_rows_of_tile<R, V>(weights + row * kPitch, x, pairs, ahead, to + row * kSumsPitch);
  for (; row < rows; row += 8)
    multiply_rows_of_tile<8, V>(weights + row * kPitch, x, pairs, ahead, to + row * kSumsPitch);
}

// Sums of `count` inputs and `rows` rows to y, whose rows of outputs are `pitch` apart.
TARGET inline void write(const float* sums, int64_t rows, int64_t count, uint16_t* y, int64_t pitch) {
  for (int64_t row = 0; row < rows; row += 16) {
    const __mmask16 room = rows - row >= 16 ? ~__mmask16(0) : (__mmask16(1) << (rows - row)) - 1;
    for (int64_t input = 0; input < count; input += 16) {
      __m512i tile[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) tile[i] = _mm512_load_si512(sums + (row + i) * kSumsPitch + input);
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        if (input + i < count)
          _mm256_mask_storeu_epi16(y + (input + i) * pitch + row, room,
                                   (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(tile[i])));
    }
  }
}

// Rows first to last - 1, at most kRows, times `count` arranged inputs.
TARGET inline void multiply_block(const Product& product, const uint32_t* x, int64_t count, uint16_t* y, int64_t first,
                                  int64_t last, Scratch& scratch) {
  const Matrix& matrix = product.matrix;
  const int64_t rows = last - first, words = matrix.words(), padded = (rows + 7) / 8 * 8;
  const uint16_t* values = static_cast<const uint16_t*>(matrix.values);
  const uint16_t *end = values + matrix.kept(), *place[kRows];
  const BFloat16* bias = static_cast<const BFloat16*>(product.bias);
  for (int64_t r = 0; r < rows; r++) {
    if (!matrix.may_read(first + r, 0)) {
      *product.is_wrong = true;
      return;
    }
    place[r] = values + matrix.starts[first + r];
  }
  for (int64_t r = 0; r < (rows + 15) / 16 * 16; r++) {
    const float start = bias && r < rows ? widen(bias[first + r]) : 0;
    std::fill_n(scratch.sums + r * kSumsPitch, (count + 15) / 16 * 16, start);
  }
  std::fill_n(scratch.weights + rows * kPitch, (padded - rows) * kPitch, uint16_t{0});
  for (int64_t word = 0; word < words; word += kWords) {
    const int64_t some = std::min(kWords, words - word), pairs = 32 * some;
    const char** line = scratch.lines;
    for (int64_t r = 0; r < rows; r++) {
      const uint8_t* mask = matrix.mask + ((first + r) * words + word) * 8;
      place[r] = unpack(place[r], end, mask, some, scratch.weights + r * kPitch);
      for (int64_t i = 0; i + 1 < kLinesOfRow; i++) *line++ = reinterpret_cast<const char*>(place[r]) + 64 * i;
      *line++ = reinterpret_cast<const char*>(mask + 8 * kWords);
    }
    if (word + some == words)
      for (int64_t r = 0; r < rows; r++)
        if (matrix.surplus(first + r, place[r] - values - matrix.starts[first + r])) *product.is_wrong = true;
    std::fill(line, scratch.lines + kLines, line[-1]);
    Ahead ahead = {scratch.lines, some == kWords ? kLines : 0, nullptr};
    for (int64_t input = 0; input < count; input += kInputs) {
      const int64_t registers = registers_of(count, input);
      const uint32_t* tile = tile_of(x, count, words, input, word);
      ahead.inputs = input + kInputs < count ? tile_of(x, count, words, input + kInputs, word)
                                             : tile_of(x, count, words, 0, word + some);
      float* sums = scratch.sums + input;
      if (registers == 3) multiply_tiles<8, 3>(scratch.weights, padded, tile, pairs, ahead, sums);
      else if (registers == 2) multiply_tiles<12, 2>(scratch.weights, padded, tile, pairs, ahead, sums);
      else multiply_tiles<24, 1>(scratch.weights, padded, tile, pairs, ahead, sums);
    }
  }
  write(scratch.sums, rows, count, y + first, matrix.rows);
}

// Rows first to last - 1 in blocks of about the same height.
TARGET inline void multiply_rows(const Product& product, const uint32_t* x, int64_t count, uint16_t* y, int64_t first,
                                 int64_t last) {
  static thread_local std::vector<Scratch> scratch(1);
  const int64_t blocks = (last - first + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; block++)
    multiply_block(product, x, count, y, first + (last - first) * block / blocks,
                   first + (last - first) * (block + 1) / blocks, scratch[0]);
}

}  // namespace blocks

// The whole product; split(part, parts) is the row where a part starts.
template <class Split> void multiply_by_blocks(const Product& product, int threads, const Split& split) {
  static thread_local std::vector<uint32_t> arranged;
  const int64_t words = product.matrix.words(), columns = product.matrix.columns;
  for (int64_t first = 0; first < product.batch; first += blocks::kMostInputs) {
    const int64_t count = std::min(blocks::kMostInputs, product.batch - first);
    const size_t size = size_t((count + 15) / 16 * 16 * words * 32);
    if (arranged.size() < size + 16) arranged.resize(size + 16);
    const uint16_t* x = static_cast<const uint16_t*>(product.x) + first * columns;
    uint16_t* y = static_cast<uint16_t*>(product.y) + first * product.matrix.rows;
    uint32_t* to = arranged.data() + (64 - uintptr_t(arranged.data()) % 64) % 64 / 4;
    in_parallel(threads, [&](int64_t part, int64_t parts) {
      blocks::arrange(x, count, columns, words, words * part / parts, words * (part + 1) / parts, to);
    });
    in_parallel(threads, [&](int64_t part, int64_t parts) {
      blocks::multiply_rows(product, to, count, y, split(part, parts), split(part + 1, parts));
    });
  }
}

#undef TARGET
#undef INLINE

}  // namespace fista::avx512
