// A team of OpenMP threads for the thread that calls. They do nothing, and sleep until it ends.
#include <omp.h>

extern "C" void hg_team(int threads) {
#pragma omp parallel num_threads(threads)
  asm volatile("" ::: "memory");  // or there is no team
}
