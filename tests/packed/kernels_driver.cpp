// Products and unpacked rows of random matrices in buffers of exact size, for the sanitizers. With a number of seconds and
// a seed: of damaged ones, which must be refused unless the damage left a matrix.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "packed_linear.cpp"

namespace {

using fista::narrow;
using fista::widen;

template <class T> int64_t bytes(const std::vector<T>& buffer) { return int64_t(buffer.size() * sizeof(T)); }

// The products of every path and number of threads with one matrix; how many were right, or -1.
template <class T> int one(int type, int64_t rows, int64_t columns, double share, int64_t batch, int most_threads) {
  std::mt19937 random(uint32_t(rows * 7919 + columns * 31 + batch));
  std::uniform_real_distribution<float> number(-1, 1);
  const int64_t width = (columns + 63) / 64 * 8;
  std::vector<uint8_t> mask(rows * width);
  std::vector<int64_t> starts{0};
  std::vector<T> values, x, bias, dense(rows * columns), y(batch * rows);
  std::vector<double> reference(rows * columns), sums(batch * rows), sizes(batch * rows);
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t column = 0; column < columns; column++)
      if (number(random) * 0.5 + 0.5 < share) {
        mask[row * width + column / 8] |= uint8_t(1 << column % 8);
        values.push_back(narrow<T>(number(random)));
        reference[row * columns + column] = widen(values.back());
      }
    starts.push_back(int64_t(values.size()));
  }
  values.shrink_to_fit();
  for (int64_t i = 0; i < batch * columns; i++) x.push_back(narrow<T>(number(random)));
  for (int64_t i = 0; i < rows; i++) bias.push_back(narrow<T>(number(random)));
  x.shrink_to_fit();
  bias.shrink_to_fit();
  for (int64_t b = 0; b < batch; b++)
    for (int64_t row = 0; row < rows; row++) {
      double sum = widen(bias[row]), size = std::fabs(sum);
      for (int64_t column = 0; column < columns; column++) {
        const double term = reference[row * columns + column] * widen(x[b * columns + column]);
        sum += term;
        size += std::fabs(term);
      }
      sums[b * rows + row] = sum;
      sizes[b * rows + row] = size;
    }
  const double rounding = type == 0 ? 1e-6 : type == 1 ? 1e-3 : 8e-3;
  const auto right = [&](int path, int threads) {
    std::fill(dense.begin(), dense.end(), narrow<T>(7));  // nothing is left of the path before
    std::fill(y.begin(), y.end(), narrow<T>(7e4f));
    if (optimum_fista_unpack(path, type, columns, values.data(), bytes(values), mask.data(), bytes(mask),
                                  starts.data(), bytes(starts), 0, dense.data(), bytes(dense), threads))
      return false;
    for (int64_t i = 0; i < rows * columns; i++)
      if (widen(dense[i]) != reference[i]) return false;
    const auto multiply = [&](int64_t value_bytes) {
      return optimum_fista_multiply(path, type, columns, values.data(), value_bytes, mask.data(), bytes(mask),
                                         starts.data(), bytes(starts), x.data(), bytes(x), bias.data(), bytes(bias),
                                         y.data(), bytes(y), threads);
    };
    if (multiply(bytes(values))) return false;
    for (int64_t i = 0; i < batch * rows; i++)
      if (!(std::fabs(widen(y[i]) - sums[i]) <= rounding * std::fabs(sums[i]) + 1e-6 * sizes[i] + 1e-6)) return false;
    return multiply(bytes(values) + int64_t(sizeof(T))) == 1;
  };
  int count = 0;
  for (int path = 0; path <= optimum_fista_best_path(); path++)
    for (int threads = 1; threads <= most_threads; threads += 2, count++)
      if (!right(path, threads)) {
        std::fprintf(stderr, "wrong: path %d, type %d, %ld x %ld, share %g, batch %ld, threads %d\n", path, type,
                     long(rows), long(columns), share, long(batch), threads);
        return -1;
      }
  return count;
}

// A buffer of exactly so many bytes, so that the sanitizer sees the first one that is touched beyond it.
struct Buffer {
  std::unique_ptr<uint8_t[]> data;
  int64_t bytes;
  explicit Buffer(int64_t bytes) : data(new uint8_t[bytes]), bytes(bytes) {}
  template <class T> T* as() const { return reinterpret_cast<T*>(data.get()); }
};

class Fuzzer {
 public:
  explicit Fuzzer(uint64_t seed) : random_(seed) {}

  // A matrix, damaged in up to three ways, and what every path makes of it.
  bool one() {
    const int type = int(draw(3)), size = type ? 2 : 4, threads = draw(8) ? 1 : 3;
    const int64_t rows = 1 + draw(draw(3) ? 9 : 70), columns = 1 + draw(draw(3) ? 200 : 700), words = (columns + 63) / 64;
    const uint64_t share = draw(5);
    Buffer mask(rows * words * 8), starts(8 * (rows + 1));
    starts.as<int64_t>()[0] = 0;
    for (int64_t row = 0; row < rows; row++) {
      int64_t ones = 0;
      for (int64_t column = 0; column < words * 64; column++) {
        const int64_t bit = row * words * 64 + column;
        const bool kept = column < columns && draw(4) < share;
        if (column % 8 == 0) mask.data[bit / 8] = 0;
        mask.data[bit / 8] |= uint8_t(kept << bit % 8);
        ones += kept;
      }
      starts.as<int64_t>()[row + 1] = starts.as<int64_t>()[row] + ones;
    }
    int64_t kept = starts.as<int64_t>()[rows], width = columns, batch = draw(3) ? draw(9) : draw(70);
    int64_t given = rows, first = 0, count = rows;
    for (int64_t damages = draw(4); damages-- > 0;) {
      int64_t& start = starts.as<int64_t>()[draw(rows + 1)];
      switch (draw(8)) {
        case 0: mask.data[draw(mask.bytes)] ^= uint8_t(1 << draw(8)); break;
        case 1: mask.data[draw(mask.bytes)] = 0xff; break;
        case 2: start = int64_t(uint64_t(start) + uint64_t(draw(3) - 1)); break;
        case 3: start = odd_number(); break;
        case 4: kept = std::max<int64_t>(0, kept + draw(5) - 2); break;
        case 5: width = draw(2) ? 1 + draw(columns + 70) : std::max<int64_t>(1, width + draw(3) - 1); break;
        case 6: given = std::max<int64_t>(0, rows + draw(3) - 1); break;
        default: first = draw(rows + 2) - draw(2), count = draw(rows + 2);
      }
    }
    Buffer values(kept * size), x(batch * width * size), bias(given * size), y(batch * given * size), dense(count * width * size);
    for (Buffer* buffer : {&values, &x, &bias})
      for (int64_t i = 0; i < buffer->bytes; i++) buffer->data[i] = uint8_t(random_());
    for (int path = 0; path <= optimum_fista_best_path(); path++) {
      const int product = optimum_fista_multiply(
          path, type, width, values.data.get(), values.bytes, mask.data.get(), mask.bytes, starts.as<int64_t>(),
          starts.bytes, x.data.get(), x.bytes, bias.data.get(), bias.bytes, y.data.get(), y.bytes, threads);
      const int unpacked = optimum_fista_unpack(
          path, type, width, values.data.get(), values.bytes, mask.data.get(), mask.bytes, starts.as<int64_t>(),
          starts.bytes, first, dense.data.get(), dense.bytes, threads);
      const bool whole = is_matrix(mask, starts, rows, width, kept);
      const bool inside = 0 <= first && first <= rows && count <= rows - first;
      if ((product == 0) != (whole && given == rows && batch > 0) || (whole && (unpacked == 0) != inside) ||
          (unpacked == 0 && !whole && first == 0 && count == rows)) {
        std::fprintf(stderr, "path %d: product %d, unpacked %d of a %s matrix\n", path, product, unpacked,
                     whole ? "right" : "damaged");
        return false;
      }
      refused += product != 0;
    }
    return true;
  }

  int64_t refused = 0;

 private:
  int64_t draw(int64_t high) { return int64_t(random_() % uint64_t(high)); }

  int64_t odd_number() {
    const int64_t numbers[] = {-1, INT64_MAX, INT64_MIN, int64_t(1) << 61, int64_t(1) << 32, int64_t(random_())};
    return numbers[draw(6)];
  }

  // Bit by bit, what the kernels find in their own ways.
  static bool is_matrix(const Buffer& mask, const Buffer& starts, int64_t rows, int64_t columns, int64_t kept) {
    const int64_t words = (columns + 63) / 64, *start = starts.as<int64_t>();
    if (mask.bytes != rows * words * 8 || start[0] != 0 || start[rows] != kept) return false;
    for (int64_t row = 0; row < rows; row++) {
      uint64_t ones = 0;
      for (int64_t column = 0; column < words * 64; column++) {
        const int64_t bit = row * words * 64 + column;
        if (!(mask.data[bit / 8] >> bit % 8 & 1)) continue;
        if (column >= columns) return false;
        ones++;
      }
      if (uint64_t(start[row + 1]) - uint64_t(start[row]) != ones) return false;
    }
    return true;
  }

  std::mt19937_64 random_;
};

int fuzz(double seconds, uint64_t seed) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  Fuzzer fuzzer(seed);
  int64_t count = 0;
  for (; std::chrono::steady_clock::now() < end; count++)
    if (!fuzzer.one()) {
      std::fprintf(stderr, "wrong: case %ld of seed %lu\n", long(count), (unsigned long)seed);
      return 1;
    }
  std::printf("right: %ld cases, %ld products refused\n", long(count), long(fuzzer.refused));
  return 0;
}

}  // namespace

int main(int count_of_arguments, char** arguments) {
  if (count_of_arguments == 3) return fuzz(std::atof(arguments[1]), std::strtoull(arguments[2], nullptr, 10));
  int count = 0;
  const int64_t shapes[][2] = {{1, 1}, {2, 7}, {3, 8}, {5, 33}, {9, 64}, {4, 129}, {11, 300}, {600, 470}};
  for (const auto& shape : shapes)
    for (double share : {0.0, 0.5, 1.0})
      for (int64_t batch : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 70}) {
        const bool large = shape[0] == 600;
        if (large && batch != 1 && batch != 13 && batch != 70) continue;
        for (int found : {one<fista::Float32>(0, shape[0], shape[1], share, batch, large ? 3 : 1),
                          one<fista::Float16>(1, shape[0], shape[1], share, batch, large ? 3 : 1),
                          one<fista::BFloat16>(2, shape[0], shape[1], share, batch, large ? 3 : 1)}) {
          if (found < 0) return 1;
          count += found;
        }
      }
  std::printf("right: %d products\n", count);
}
