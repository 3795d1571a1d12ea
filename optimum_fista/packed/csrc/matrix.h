// A packed matrix and one product with it, as the kernels of every instruction set see them.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

namespace fista {

// Widest register that a kernel loads at a place of the values, in elements: what may lie after a row's last value.
constexpr int64_t kLookahead = 32;

// Nothing is known of what `mask` and `starts` hold, but that starts[0] = 0 and starts[rows] is the number of values. A
// kernel asks `may_read` before it reads a row, and `surplus` when it has read it: both are right for all rows only if
// the mask is that of the starts.
struct Matrix {
  const void* values;     // [kept]
  const uint8_t* mask;    // [rows, words * 8], bit j = column j, lowest first
  const int64_t* starts;  // [rows + 1], where the values of each row start
  int64_t rows, columns;

  int64_t words() const { return (columns + 63) / 64; }
  int64_t kept() const { return starts[rows]; }

  uint64_t word(int64_t row, int64_t index) const {
    uint64_t bits;
    std::memcpy(&bits, mask + (row * words() + index) * 8, 8);
    return bits;
  }

  // Whether reading a row and `beyond` values more stays inside all: even with every bit set, or else by its count.
  bool may_read(int64_t row, int64_t beyond) const {
    const int64_t end = kept() - beyond;
    return (starts[row] >= 0 && starts[row] <= end - words() * 64) || (starts[row + 1] <= end && is_counted(row));
  }

  // Whether a row has as many ones as values, and these lie inside all.
  __attribute__((noinline, cold)) bool is_counted(int64_t row) const {
    int64_t ones = 0;
    for (int64_t index = 0; index < words(); index++) ones += __builtin_popcountll(word(row, index));
    return starts[row] >= 0 && starts[row] <= starts[row + 1] && starts[row + 1] <= kept() && !surplus(row, ones);
  }

  // Not zero where a row whose ones took `used` values has others by its starts, or ones after its columns.
  uint64_t surplus(int64_t row, int64_t used) const {
    const uint64_t beyond = columns % 64 ? ~uint64_t(0) << columns % 64 : 0;
    return (uint64_t(used) ^ (uint64_t(starts[row + 1]) - uint64_t(starts[row]))) | (word(row, words() - 1) & beyond);
  }
};

struct Product {
  Matrix matrix;
  const void* x;     // [words, batch, 64], what the instruction set computes with, zeros after the columns
  const void* bias;  // [rows] or null
  void* y;           // [batch, rows]
  int64_t batch;
  std::atomic<bool>* is_wrong;  // set where the mask is found not to be that of the starts
};

}  // namespace fista
