// A packed matrix and one product with it, as the kernels of every instruction set see them.
#pragma once

#include <cstdint>

namespace fista {

struct Matrix {
  const void* values;     // [kept]
  const uint8_t* mask;    // [rows, words * 8], bit j = column j, lowest first
  const int64_t* starts;  // [rows + 1], where the values of each row start
  int64_t rows, columns;

  int64_t words() const { return (columns + 63) / 64; }
  int64_t kept() const { return starts[rows]; }
};

struct Product {
  Matrix matrix;
  const void* x;     // [words, batch, 64], what the instruction set computes with, zeros behind the columns
  const void* bias;  // [rows] or null
  void* y;           // [batch, rows]
  int64_t batch;
};

// Widest register that a kernel loads at a place of the values, in elements: what may lie behind a row's last value.
constexpr int64_t kLookahead = 32;

}  // namespace fista
