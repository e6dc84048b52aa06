// combine_outputs on CPU: the weighted sum of pairs' outputs, with the roundings of grouped_ffn.
#include <omp.h>

#include "grouped_ffn/problem.h"

namespace hg {

struct CombineArgs {  // as Args, one flat array; see on_cpu.py
  int64_t dtype, threads, R, K, E, O;
  const int32_t* ids;    // [R, K]
  const float* weights;  // [R, K]
  const float* pairs;    // [R*K, O]
  void* y;               // [R, O]
};

// An output times its weight in T, as grouped_ffn keeps it. Not inlined: the sum must not take the product unrounded.
template <class T>
__attribute__((noinline)) void weigh(const float* x, float weight, int n, T* to) {
  for (int o = 0; o < n; o += LANES) store(to + o, load(x + o, n - o) * weight, n - o);
}

template <class T>
void combine(const CombineArgs& a) {
  const int K = int(a.K), O = int(a.O), threads = a.R > 1 ? int(a.threads) : 1;
  Scratch<T> scratch(size_t(threads) * K * O);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < a.R; ++t) {
    T* mine = scratch.get() + size_t(omp_get_thread_num()) * K * O;
    int n = 0;  // live pairs
    for (int64_t p = t * K; p < (t + 1) * K; ++p)
      if (a.ids[p] >= 0 && a.ids[p] < a.E) weigh(a.pairs + p * O, a.weights[p], O, mine + size_t(n++) * O);
    for (int o = 0; o < O; o += LANES) {
      vf s{};
      for (int k = 0; k < n; ++k) s = s + load(mine + size_t(k) * O + o, O - o);
      store((T*)a.y + t * O + o, s, O - o);
    }
  }
}

}  // namespace hg

extern "C" int hg_combine_outputs(const hg::CombineArgs* args) {
  try {
    switch (args->dtype) {
      case 0: return hg::combine<float>(*args), 0;
      case 1: return hg::combine<hg::bf16>(*args), 0;
      case 2: return hg::combine<hg::f16>(*args), 0;
      default: return 3;
    }
  } catch (const std::bad_alloc&) {
    return 2;
  }
}
