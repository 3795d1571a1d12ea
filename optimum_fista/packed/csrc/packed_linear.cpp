// Products with packed matrices on the CPU: a plain C interface, tied to no version of PyTorch.
//
// The format is that of docs/formats.md with one bit a weight. Weights, inputs, bias and outputs have the same dtype;
// sums are taken in float32. Sizes are compared here, and no content of a mask or of row starts makes a kernel touch what
// lies beside its buffers: what does not fit is refused, before the product or, row by row, within it.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "matrix.h"
#include "numbers.h"
#include "portable.h"
#include "threads.h"

#if defined(__x86_64__)
#include "avx2.h"
#include "avx512.h"
#include "blocks.h"
#include "yardsticks.h"
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fista {
namespace {

enum Path { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
enum Type { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t kWorkOfAThread = 1 << 18;
constexpr int64_t kManyInputs = 16;  // from where blocks are faster than rows

// What a call returns.
enum Outcome { kDone = 0, kSizesDiffer = 1, kMaskIsWrong = 2 };

int64_t bytes_of(int type) { return type == kFloat32 ? 4 : type == kFloat16 || type == kBFloat16 ? 2 : 0; }

// Whether total = factor * other, by divisions, which can't overflow.
bool is_product(int64_t total, int64_t factor, int64_t other) {
  return factor > 0 && total % factor == 0 && total / factor == other;
}

// Whether buffers of these bytes are a matrix of at least one row and one column.
bool sizes_fit(const Matrix& matrix, int64_t size, int64_t value_bytes, int64_t mask_bytes, int64_t start_bytes) {
  return matrix.rows > 0 && matrix.columns > 0 && matrix.columns <= 8 * mask_bytes && size > 0 &&
         is_product(start_bytes, 8, matrix.rows + 1) && is_product(mask_bytes, matrix.rows, matrix.words() * 8) &&
         matrix.starts[0] == 0 && is_product(value_bytes, size, matrix.kept());
}

// Row where a part starts, such that the parts read about the same number of bytes if the starts rise; whatever they
// hold, the parts together are all rows.
int64_t row_of_part(const Matrix& matrix, int64_t part, int64_t parts, int64_t bytes_of_a_value) {
  const int64_t of_a_row = matrix.words() * 8;
  const int64_t wanted = (matrix.kept() * bytes_of_a_value + matrix.rows * of_a_row) / parts * part;
  if (part == 0 || part == parts) return part ? matrix.rows : 0;
  int64_t low = 0, high = matrix.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (int64_t(uint64_t(matrix.starts[middle]) * bytes_of_a_value) < wanted - middle * of_a_row) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Inputs by words of columns, so that they are read in order; zeros after the columns, widened where the kernel
// computes in float32.
template <class T, class Input> const void* prepare(const T* x, int64_t batch, const Matrix& matrix) {
  static thread_local std::vector<Input> prepared;
  if (int64_t(prepared.size()) < batch * matrix.words() * 64) prepared.resize(batch * matrix.words() * 64);
  for (int64_t b = 0; b < batch; b++)
    for (int64_t word = 0; word < matrix.words(); word++) {
      const T* from = x + b * matrix.columns + word * 64;
      Input* to = prepared.data() + (word * batch + b) * 64;
      const int64_t count = std::min<int64_t>(64, matrix.columns - word * 64);
      if constexpr (sizeof(Input) == sizeof(T)) std::memcpy(to, from, sizeof(T) * count);
      else for (int64_t j = 0; j < count; j++) to[j] = widen(from[j]);
      std::fill(to + count, to + 64, Input{});
    }
  return prepared.data();
}

int threads_for(const Product& product, int threads) {
  return product.matrix.rows * product.matrix.columns * product.batch < kWorkOfAThread ? 1 : threads;
}

template <class Lanes> using Rows = void (*)(const Product&, int64_t, int64_t);

template <class Lanes> void run(Product product, Rows<Lanes> rows, int threads) {
  using Weight = typename Lanes::Weight;
  product.x = prepare<Weight, typename Lanes::Input>(static_cast<const Weight*>(product.x), product.batch, product.matrix);
  in_parallel(threads_for(product, threads), [&](int64_t part, int64_t parts) {
    rows(product, row_of_part(product.matrix, part, parts, sizeof(Weight)),
         row_of_part(product.matrix, part + 1, parts, sizeof(Weight)));
  });
}

template <class T> void multiply(int path, const Product& product, int threads) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (path == kAvx512 && product.batch >= kManyInputs)
      return avx512::multiply_by_blocks(product, threads_for(product, threads), [&](int64_t part, int64_t parts) {
        return row_of_part(product.matrix, part, parts, sizeof(T));
      });
  if (path == kAvx512) return run<avx512::Lanes<T>>(product, avx512::multiply<avx512::Lanes<T>>, threads);
  if (path == kAvx2) return run<avx2::Lanes<T>>(product, avx2::multiply<avx2::Lanes<T>>, threads);
#endif
  run<portable::Lanes<T>>(product, portable::multiply<portable::Lanes<T>>, threads);
}

template <class T> bool unpack(int path, const Matrix& matrix, int64_t first, int64_t last, void* dense, int threads) {
  std::atomic<bool> is_wrong{false};
  const T* values = static_cast<const T*>(matrix.values);
  in_parallel((last - first) * matrix.columns < kWorkOfAThread ? 1 : threads, [&](int64_t part, int64_t parts) {
    for (int64_t row = first + (last - first) * part / parts; row < first + (last - first) * (part + 1) / parts; row++) {
      auto unpack_row = portable::unpack_row<T>;
#if defined(__x86_64__)
      if (path == kAvx512) unpack_row = avx512::unpack_row<T>;
#endif
      if (!matrix.may_read(row, 0)) {
        is_wrong = true;
        return;
      }
      const T* start = values + matrix.starts[row];
      const T* end = unpack_row(start, matrix.kept() - matrix.starts[row], matrix.mask + row * matrix.words() * 8,
                                static_cast<T*>(dense) + (row - first) * matrix.columns, matrix.columns);
      if (matrix.surplus(row, end - start)) is_wrong = true;
    }
  });
  return !is_wrong;
}

}  // namespace
}  // namespace fista

// Best path of this CPU: 0 portable, 1 AVX2, 2 AVX-512.
EXPORT int optimum_fista_best_path() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("avx512bf16"))
    return fista::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fista::kAvx2;
#endif
  return fista::kPortable;
}

// GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the OpenMP library to use.
EXPORT void optimum_fista_use_openmp(void* parallel, void* thread_number, void* number_of_threads) {
  fista::open_mp.parallel = reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(parallel);
  fista::open_mp.thread_number = reinterpret_cast<int (*)()>(thread_number);
  fista::open_mp.number_of_threads = reinterpret_cast<int (*)()>(number_of_threads);
}

// y [batch, rows] = x [batch, columns] times the matrix transposed, plus bias [rows] where it is not null. Each buffer
// comes with its bytes; rows and batch follow from them. Returns an Outcome; y holds the product where that is kDone.
EXPORT int optimum_fista_multiply(int path, int type, int64_t columns, const void* values, int64_t value_bytes,
                                       const uint8_t* mask, int64_t mask_bytes, const int64_t* starts,
                                       int64_t start_bytes, const void* x, int64_t x_bytes, const void* bias,
                                       int64_t bias_bytes, void* y, int64_t y_bytes, int threads) {
  using namespace fista;
  const Matrix matrix = {values, mask, starts, start_bytes / 8 - 1, columns};
  const int64_t size = bytes_of(type);
  if (!sizes_fit(matrix, size, value_bytes, mask_bytes, start_bytes)) return kSizesDiffer;
  const int64_t batch = x_bytes / (columns * size);
  if (batch < 1 || x_bytes % (columns * size) || !is_product(y_bytes, matrix.rows * size, batch) ||
      (bias && bias_bytes != matrix.rows * size))
    return kSizesDiffer;
  std::atomic<bool> is_wrong{false};
  const Product product = {matrix, x, bias, y, batch, &is_wrong};
  if (type == kBFloat16) multiply<BFloat16>(path, product, threads);
  else if (type == kFloat16) multiply<Float16>(path, product, threads);
  else multiply<Float32>(path, product, threads);
  return is_wrong ? kMaskIsWrong : kDone;
}

// Rows from `first` on as a dense matrix of `columns` columns and dense_bytes bytes; returns as above.
EXPORT int optimum_fista_unpack(int path, int type, int64_t columns, const void* values, int64_t value_bytes,
                                     const uint8_t* mask, int64_t mask_bytes, const int64_t* starts,
                                     int64_t start_bytes, int64_t first, void* dense, int64_t dense_bytes,
                                     int threads) {
  using namespace fista;
  const Matrix matrix = {values, mask, starts, start_bytes / 8 - 1, columns};
  const int64_t size = bytes_of(type);
  if (!sizes_fit(matrix, size, value_bytes, mask_bytes, start_bytes)) return kSizesDiffer;
  const int64_t count = dense_bytes / (columns * size);
  if (dense_bytes % (columns * size) || first < 0 || first > matrix.rows || count > matrix.rows - first)
    return kSizesDiffer;
  const bool is_right = size == 2 ? unpack<BFloat16>(path, matrix, first, first + count, dense, threads)
                                  : unpack<Float32>(path, matrix, first, first + count, dense, threads);
  return is_right ? kDone : kMaskIsWrong;
}

// For benchmarks, on CPUs with AVX2 or AVX-512: y [rows] = dense W [rows, columns] x in bfloat16, columns a multiple of
// 64. Returns 1 where it can't.
EXPORT int optimum_fista_measure_dense(int64_t rows, int64_t columns, const uint16_t* weight, const uint16_t* x,
                                       uint16_t* y, int threads) {
#if defined(__x86_64__)
  const int path = optimum_fista_best_path();
  if (path != fista::kPortable && columns % 64 == 0) {
    const std::vector<float> parted =
        path == fista::kAvx2 ? fista::yardsticks::avx2::evens_and_odds(x, columns) : std::vector<float>();
    fista::in_parallel(rows * columns < fista::kWorkOfAThread ? 1 : threads, [&](int64_t part, int64_t parts) {
      const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
      if (path == fista::kAvx512) fista::yardsticks::avx512::dense_rows<4>(weight, x, y, columns, first, last);
      else fista::yardsticks::avx2::dense_rows<4>(weight, parted.data(), y, columns, first, last);
    });
    return 0;
  }
#endif
  (void)rows, (void)columns, (void)weight, (void)x, (void)y, (void)threads;
  return 1;
}

// For benchmarks, as above: reads `bytes` bytes, a multiple of 512 for each thread.
EXPORT int optimum_fista_measure_read(const char* data, int64_t bytes, int64_t* result, int threads) {
#if defined(__x86_64__)
  const int path = optimum_fista_best_path();
  if (path != fista::kPortable) {
    fista::in_parallel(threads, [&](int64_t part, int64_t parts) {
      const int64_t share = bytes / parts / 512 * 512;
      const char* start = data + part * share;
      result[part] = path == fista::kAvx512 ? fista::yardsticks::avx512::read(start, share)
                                            : fista::yardsticks::avx2::read(start, share);
    });
    return 0;
  }
#endif
  (void)data, (void)bytes, (void)result, (void)threads;
  return 1;
}
