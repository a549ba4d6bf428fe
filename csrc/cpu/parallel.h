// A parallel loop whose result cannot depend on the number of threads: every index is computed
// by one thread, alone. Dynamic, since rows that are not scored cost nothing.
#pragma once

#include <cstdint>

namespace pk {

template <class F>
void parallel_for(int64_t count, int threads, int64_t chunk, F&& f) {
#ifdef _OPENMP
  if (threads > 1 && count > chunk) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
#else
  (void)threads;
  (void)chunk;
#endif
  for (int64_t i = 0; i < count; ++i) f(i);
}

}  // namespace pk
