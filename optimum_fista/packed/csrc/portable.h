// Any CPU: plain C++ over whole words of the mask.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "matrix.h"
#include "numbers.h"

namespace fista::portable {

#define TARGET
#define PREFETCH(address) (void)0

template <class T> struct Lanes {
  using Weight = T;
  using Input = float;
  static constexpr int kStep = 64, kSums = 1, kRows = 1, kStreams = 1, kInputs = 8;
  struct Weights { float lane[64]; };
  struct Sums { float lane[16]; };

  static uint64_t part(uint64_t word, int) { return word; }

  static Weights expand(const T* values, uint64_t bits) {
    Weights weights = {};
    for (; bits; bits &= bits - 1) weights.lane[__builtin_ctzll(bits)] = widen(*values++);
    return weights;
  }

  template <int> static const float* inputs(const float* x) { return x; }

  static void add(Sums& sums, const Weights& weights, const float* x) {
    for (int i = 0; i < 64; i++) sums.lane[i % 16] += weights.lane[i] * x[i];
  }

  static float total(const Sums& sums) {
    float total = 0;
    for (float lane : sums.lane) total += lane;
    return total;
  }
};

#include "rows.inl"

// One dense row; returns where its values end.
template <class T> const T* unpack_row(const T* values, int64_t, const uint8_t* mask, T* dense, int64_t columns) {
  for (int64_t start = 0; start < columns; start += 64) {
    uint64_t bits;
    std::memcpy(&bits, mask + start / 8, 8);
    if (columns - start < 64) bits &= (uint64_t(1) << (columns - start)) - 1;  // nothing is written after the row
    std::memset(dense + start, 0, sizeof(T) * (columns - start < 64 ? columns - start : 64));
    for (; bits; bits &= bits - 1) dense[start + __builtin_ctzll(bits)] = *values++;
  }
  return values;
}

#undef TARGET
#undef PREFETCH

}  // namespace fista::portable
