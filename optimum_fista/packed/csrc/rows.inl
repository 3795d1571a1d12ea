// Rows of a packed matrix times some inputs, for one instruction set. Included once for each, inside a namespace that
// defines TARGET (the function attribute) and the lanes of each dtype:
//
//   struct Lanes {
//     using Weight = ..., Input = ...;           // what the values and the prepared inputs are made of
//     static constexpr int kStep = ...;          // columns of one step, a divisor of 64
//     static constexpr int kSums = ...;          // sums to keep at a time
//     static constexpr int kRows = ...;          // most rows to read side by side
//     static constexpr int kStreams = ...;       // most rows to read side by side from memory, for one input
//     static constexpr int kInputs = ...;        // most inputs to multiply at once
//     struct Weights, Sums;                      // registers
//     static uint64_t part(uint64_t word, int step);               // bits of one step of a word of the mask, moved to
//                                                                  // where expand wants them
//     static Weights expand(const Weight* values, uint64_t part);  // may read kLookahead weights
//     template <int sums> static Inputs inputs(const Input*);      // inputs of one step, beside so many sums
//     static void add(Sums&, const Weights&, const Inputs&);       // Sums += Weights * Inputs
//     static float total(const Sums&);
//   };

// Bytes of values from which a matrix is taken to come from memory, not from a cache.
constexpr int64_t kStreamedBytes = 4 << 20;

template <class Lanes, int R, int B>
TARGET void multiply_rows(const Product& product, const typename Lanes::Weight* const* values, int64_t row,
                          int64_t apart, int64_t first_input) {
  using Weight = typename Lanes::Weight;
  using Input = typename Lanes::Input;
  constexpr int kStep = Lanes::kStep;
  constexpr int U = R * B >= 4 || kStep == 64 ? 1 : 4 / (R * B) < 64 / kStep ? 4 / (R * B) : 64 / kStep;
  [[maybe_unused]] constexpr int kAhead = R >= 4 ? 2048 : 3072;  // bytes; all rows together 6 to 8 KiB
  const int64_t words = product.matrix.words();
  const uint8_t* mask = product.matrix.mask + row * words * 8;
  const Input* x = static_cast<const Input*>(product.x) + first_input * 64;
  const Weight* place[R];
  typename Lanes::Sums sums[R][B][U] = {};
  for (int r = 0; r < R; r++) place[r] = values[r];
  for (int64_t word = 0; word < words; word++, x += product.batch * 64) {
    uint64_t bits[R];
    for (int r = 0; r < R; r++) {
      std::memcpy(&bits[r], mask + (r * apart * words + word) * 8, 8);
      if (word % 8 == 0) PREFETCH(mask + (r * apart * words + word) * 8 + 512);
      PREFETCH(reinterpret_cast<const char*>(place[r]) + kAhead);
    }
#pragma GCC unroll 8
    for (int step = 0; step < 64 / kStep; step++) {
      typename Lanes::Weights weights[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const uint64_t part = Lanes::part(bits[r], step);
        weights[r] = Lanes::expand(place[r], part);
        place[r] += __builtin_popcountll(part);
      }
#pragma GCC unroll 16
      for (int b = 0; b < B; b++) {
        const auto inputs = Lanes::template inputs<R * B>(x + b * 64 + step * kStep);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) Lanes::add(sums[r][b][step % U], weights[r], inputs);
      }
    }
  }
  uint64_t surplus = 0;
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) surplus |= product.matrix.surplus(row + r * apart, place[r] - values[r]);
  if (surplus) *product.is_wrong = true;
  const Weight* bias = static_cast<const Weight*>(product.bias);
  Weight* y = static_cast<Weight*>(product.y);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int b = 0; b < B; b++) {
      float total = bias ? widen(bias[row + r * apart]) : 0;
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) total += Lanes::total(sums[r][b][u]);
      y[(first_input + b) * product.matrix.rows + row + r * apart] = narrow<Weight>(total);
    }
}

// Rows read side by side for a batch: as many sums as there are registers for.
template <class Lanes> constexpr int rows_for(int batch) {
  return Lanes::kRows >= 4 && 4 * batch <= Lanes::kSums ? 4 : 2 * batch <= Lanes::kSums ? 2 : 1;
}

template <class Lanes> constexpr int64_t inputs_at_once(int64_t batch) {
  constexpr int kMost = Lanes::kInputs;
  return batch <= kMost ? batch : batch < 2 * kMost ? (batch + 1) / 2 : kMost;
}

template <class Lanes, int R, int B = Lanes::kInputs>
TARGET void multiply_inputs(const Product& product, const typename Lanes::Weight* const* values, int64_t row,
                            int64_t apart, int64_t first_input, int64_t inputs) {
  if constexpr (R <= rows_for<Lanes>(B))
    if (inputs == B) return multiply_rows<Lanes, R, B>(product, values, row, apart, first_input);
  if constexpr (B > 1) multiply_inputs<Lanes, R, B - 1>(product, values, row, apart, first_input, inputs);
}

template <class Lanes, int R>
TARGET void multiply_batch(const Product& product, const typename Lanes::Weight* const* values, int64_t row,
                           int64_t apart) {
  const int64_t size = inputs_at_once<Lanes>(product.batch);
  for (int64_t first = 0; first < product.batch; first += size)
    multiply_inputs<Lanes, R>(product, values, row, apart, first, std::min(size, product.batch - first));
}

// A row from a copy with spare values at its end: a register would reach beyond the last value.
template <class Lanes> TARGET void multiply_copied(const Product& product, int64_t row) {
  using Weight = typename Lanes::Weight;
  if (!product.matrix.is_counted(row)) {
    *product.is_wrong = true;
    return;
  }
  const Weight* values = static_cast<const Weight*>(product.matrix.values);
  std::vector<Weight> copy(values + product.matrix.starts[row], values + product.matrix.starts[row + 1]);
  copy.resize(copy.size() + kLookahead, Weight{0});
  const Weight* start = copy.data();
  multiply_batch<Lanes, 1>(product, &start, row, 1);
}

// R rows are read side by side, each the next of its own run of rows, so that every stream is contiguous in memory.
template <class Lanes, int R> TARGET void multiply_runs(const Product& product, int64_t first_row, int64_t last_row) {
  using Weight = typename Lanes::Weight;
  const Matrix& matrix = product.matrix;
  const Weight* values = static_cast<const Weight*>(matrix.values);
  while (last_row > first_row && matrix.starts[last_row] > matrix.kept() - kLookahead)
    multiply_copied<Lanes>(product, --last_row);
  const int64_t apart = (last_row - first_row) / R;
  for (int64_t row = first_row; row < first_row + apart; row++) {
    const Weight* starts[R];
    for (int r = 0; r < R; r++) {
      if (!matrix.may_read(row + r * apart, kLookahead)) {
        *product.is_wrong = true;
        return;
      }
      starts[r] = values + matrix.starts[row + r * apart];
    }
    multiply_batch<Lanes, R>(product, starts, row, apart);
  }
  for (int64_t row = first_row + R * apart; row < last_row; row++) {
    if (!matrix.may_read(row, kLookahead)) {
      *product.is_wrong = true;
      return;
    }
    const Weight* start = values + matrix.starts[row];
    multiply_batch<Lanes, 1>(product, &start, row, 1);
  }
}

template <class Lanes> TARGET void multiply(const Product& product, int64_t first_row, int64_t last_row) {
  int rows = rows_for<Lanes>(int(inputs_at_once<Lanes>(product.batch)));
  const bool is_streamed = product.matrix.kept() * int64_t(sizeof(typename Lanes::Weight)) >= kStreamedBytes;
  if (product.batch == 1 && is_streamed) rows = std::min(rows, Lanes::kStreams);
  switch (rows) {
    case 4: return multiply_runs<Lanes, 4>(product, first_row, last_row);
    case 2: return multiply_runs<Lanes, 2>(product, first_row, last_row);
    default: return multiply_runs<Lanes, 1>(product, first_row, last_row);
  }
}
