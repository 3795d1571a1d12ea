// Threads of the OpenMP library that PyTorch has loaded, given by its functions; std::thread without one.
#pragma once

#include <thread>
#include <vector>

namespace fista {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;  // GOMP_parallel
  int (*thread_number)() = nullptr;                                        // omp_get_thread_num
  int (*number_of_threads)() = nullptr;                                    // omp_get_num_threads
};

inline OpenMP open_mp;

// work(part, parts) for every part.
template <class Work> void in_parallel(int threads, const Work& work) {
  if (threads <= 1) {
    work(0, 1);
  } else if (open_mp.parallel) {
    const auto one = [](void* data) {
      (*static_cast<const Work*>(data))(open_mp.thread_number(), open_mp.number_of_threads());
    };
    open_mp.parallel(one, const_cast<Work*>(&work), unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int part = 1; part < threads; part++) others.emplace_back([&, part] { work(part, threads); });
    work(0, threads);
    for (std::thread& other : others) other.join();
  }
}

}  // namespace fista
