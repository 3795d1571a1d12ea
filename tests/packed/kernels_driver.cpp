// Products and unpacked rows of random matrices in buffers of exact size, for the sanitizers.

#include <cmath>
#include <cstdio>
#include <random>

#include "packed_linear.cpp"

namespace {

using fista::narrow;
using fista::widen;

template <class T> bool one(int path, int type, int64_t rows, int64_t columns, double share, int64_t batch, int threads) {
  std::mt19937 random(uint32_t(rows * 7919 + columns * 31 + batch));
  std::uniform_real_distribution<float> number(-1, 1);
  const int64_t bytes = (columns + 63) / 64 * 8;
  std::vector<uint8_t> mask(rows * bytes);
  std::vector<int64_t> starts{0};
  std::vector<T> values, x, bias, dense(rows * columns), y(batch * rows);
  std::vector<double> reference(rows * columns);
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t column = 0; column < columns; column++)
      if (number(random) * 0.5 + 0.5 < share) {
        mask[row * bytes + column / 8] |= uint8_t(1 << column % 8);
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
  const int64_t kept = int64_t(values.size());
  if (optimum_fista_unpack_rows(path, sizeof(T), rows, columns, values.data(), kept, mask.data(), starts.data(), 0, rows,
                                dense.data(), threads))
    return false;
  for (int64_t i = 0; i < rows * columns; i++)
    if (widen(dense[i]) != reference[i]) return false;
  if (optimum_fista_packed_linear(path, type, rows, columns, values.data(), kept, mask.data(), starts.data(), x.data(),
                                  batch, bias.data(), y.data(), threads))
    return false;
  const double rounding = type == 0 ? 1e-6 : type == 1 ? 1e-3 : 8e-3;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t row = 0; row < rows; row++) {
      double sum = widen(bias[row]), size = std::fabs(sum);
      for (int64_t column = 0; column < columns; column++) {
        const double term = reference[row * columns + column] * widen(x[b * columns + column]);
        sum += term;
        size += std::fabs(term);
      }
      if (!(std::fabs(widen(y[b * rows + row]) - sum) <= rounding * std::fabs(sum) + 1e-6 * size + 1e-6)) return false;
    }
  return optimum_fista_packed_linear(path, type, rows, columns, values.data(), kept + 1, mask.data(), starts.data(),
                                     x.data(), batch, bias.data(), y.data(), threads) == 1;
}

}  // namespace

int main() {
  int count = 0;
  const int64_t shapes[][2] = {{1, 1}, {2, 7}, {3, 8}, {5, 33}, {9, 64}, {4, 129}, {11, 300}, {600, 470}};
  for (int path = 0; path <= optimum_fista_best_path(); path++)
    for (const auto& shape : shapes)
      for (double share : {0.0, 0.5, 1.0})
        for (int64_t batch : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 70})
          for (int threads : {1, 3}) {
            if (shape[0] == 600 ? batch != 1 && batch != 13 && batch != 70 : threads > 1) continue;
            if (!one<fista::Float32>(path, 0, shape[0], shape[1], share, batch, threads) ||
                !one<fista::Float16>(path, 1, shape[0], shape[1], share, batch, threads) ||
                !one<fista::BFloat16>(path, 2, shape[0], shape[1], share, batch, threads)) {
              std::fprintf(stderr, "wrong: path %d, %ld x %ld, share %g, batch %ld, threads %d\n", path, long(shape[0]),
                           long(shape[1]), share, long(batch), threads);
              return 1;
            }
            count += 3;
          }
  std::printf("right: %d products\n", count);
}
