// Products with packed matrices on the CPU: a plain C interface, tied to no version of PyTorch.
//
// The format is that of docs/formats.md with one bit a weight. Weights, inputs, bias and outputs have the same dtype;
// sums are taken in float32. The caller has checked sizes, masks and counts (packed/validation.py).

#include <algorithm>
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

// Row where a part starts, such that the parts read about the same number of bytes.
int64_t row_of_part(const Matrix& matrix, int64_t part, int64_t parts, int64_t bytes_of_a_value) {
  const int64_t of_a_row = matrix.words() * 8;
  const int64_t wanted = (matrix.kept() * bytes_of_a_value + matrix.rows * of_a_row) / parts * part;
  if (part == parts) return matrix.rows;
  int64_t low = 0, high = matrix.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (matrix.starts[middle] * bytes_of_a_value + middle * of_a_row < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Inputs by words of columns, so that they are read in order; zeros behind the columns, widened where the kernel
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

template <class T> void unpack(int path, const Matrix& matrix, int64_t first, int64_t last, void* dense, int threads) {
  const T* values = static_cast<const T*>(matrix.values);
  in_parallel((last - first) * matrix.columns < kWorkOfAThread ? 1 : threads, [&](int64_t part, int64_t parts) {
    for (int64_t row = first + (last - first) * part / parts; row < first + (last - first) * (part + 1) / parts; row++) {
      auto unpack_row = portable::unpack_row<T>;
#if defined(__x86_64__)
      if (path == kAvx512) unpack_row = avx512::unpack_row<T>;
#endif
      unpack_row(values + matrix.starts[row], matrix.kept() - matrix.starts[row],
                 matrix.mask + row * matrix.words() * 8, static_cast<T*>(dense) + (row - first) * matrix.columns,
                 matrix.columns);
    }
  });
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

// y [batch, rows] = x [batch, columns] times the matrix transposed, plus bias [rows] where it is not null.
// Returns 1 without doing anything where `kept` values are not what `starts` ends with, else 0.
EXPORT int optimum_fista_packed_linear(int path, int type, int64_t rows, int64_t columns, const void* values,
                                       int64_t kept, const uint8_t* mask, const int64_t* starts, const void* x,
                                       int64_t batch, const void* bias, void* y, int threads) {
  if (starts[rows] != kept) return 1;
  const fista::Product product = {{values, mask, starts, rows, columns}, x, bias, y, batch};
  if (type == fista::kBFloat16) fista::multiply<fista::BFloat16>(path, product, threads);
  else if (type == fista::kFloat16) fista::multiply<fista::Float16>(path, product, threads);
  else fista::multiply<fista::Float32>(path, product, threads);
  return 0;
}

// Rows first to last - 1 as a dense matrix [last - first, columns]; returns as above.
EXPORT int optimum_fista_unpack_rows(int path, int bytes_of_a_value, int64_t rows, int64_t columns, const void* values,
                                     int64_t kept, const uint8_t* mask, const int64_t* starts, int64_t first,
                                     int64_t last, void* dense, int threads) {
  if (starts[rows] != kept) return 1;
  const fista::Matrix matrix = {values, mask, starts, rows, columns};
  if (bytes_of_a_value == 2) fista::unpack<fista::BFloat16>(path, matrix, first, last, dense, threads);
  else fista::unpack<fista::Float32>(path, matrix, first, last, dense, threads);
  return 0;
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
