// What a call of grouped_ffn is about: the arguments as Python hands them over, and the plan made of them.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "activation.h"
#include "gemm.h"
#include "plan/order.h"

namespace hg {

// One flat array of 64-bit integers (addresses, sizes, strides in elements), in this order; see _Call in on_cpu.py.
struct Args {
  int64_t dtype, threads;
  int64_t R, K, E, D, F, O;  // rows, experts per row, experts, input, intermediate and output size
  int64_t kind, gated, interleaved;
  const float* params;       // alpha, limit (0: none), up_shift, clamp_after, slope_at_limit
  const int32_t* ids;        // [R, K]
  const float* weights;      // [R, K]
  const void* rows;
  int64_t rows_r;
  const void* w1;            // gate and up, or gate alone where wu is given
  int64_t w1_e, w1_r, w1_c;  // strides: expert, output row, input column
  const void* wu;
  int64_t wu_e, wu_r, wu_c;
  const void* w2;
  int64_t w2_e, w2_r, w2_c;
  const void *b1, *b2;       // [E, W], [E, O], contiguous, or null
  void *y, *h;               // forward: [R, O]; [R*K, W] or null. Neither y nor pairs: h is all that is asked for
  const void* grad;          // backward, and all below; null = not asked for
  int64_t grad_r;
  void* dx;                  // [R, D]
  float* ds;                 // [R, K]
  void* dw1;                 // contiguous as w1's logical shape
  int64_t dw1_e, dw1_r, dw1_c;
  void* dwu;
  int64_t dwu_e, dwu_r, dwu_c;
  void* dw2;
  int64_t dw2_e, dw2_r, dw2_c;
  void *db1, *db2;
  // expert_outputs: weights and biases of expert e lie in slot slots[e] (-1: not here; null: in slot e), and the output
  // of each of its pairs, not weighted, goes to pairs [R*K, O] (null: weighted and summed to y). expert_gradients: the
  // same slots, and a pair's dX goes to pairs [R*K, D] (null: summed to dx). slots is w1's table; wu and w2 may have
  // others, with the same experts here
  const int32_t *slots, *slots_u, *slots_2;
  float* pairs;
};

// Large fresh memory in huge pages: a page fault per 2 MiB, not per 4 KiB.
inline void want_huge_pages(void* p, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t huge = uintptr_t(1) << 21, lo = (uintptr_t(p) + huge - 1) & ~(huge - 1);
  const uintptr_t hi = (uintptr_t(p) + bytes) & ~(huge - 1);
  if (hi > lo) madvise((void*)lo, hi - lo, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

// Scratch memory; throws std::bad_alloc. Large pieces come from the system and go back to it at once: the allocator
// would keep them for later, on top of everything else that the process holds.
template <class U>
class Scratch {
  static constexpr size_t HUGE_PAGE = size_t(1) << 21, LARGE = 2 * HUGE_PAGE;
  void* base = nullptr;
  size_t mapped = 0;
  U* begin = nullptr;

 public:
  explicit Scratch(size_t n) {
    const size_t bytes = (n * sizeof(U) + 63) & ~size_t(63);
    if (bytes < LARGE) {
      if (bytes && !(base = std::aligned_alloc(64, bytes))) throw std::bad_alloc();
      begin = (U*)base;
      return;
    }
    mapped = bytes + HUGE_PAGE;
    base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    begin = (U*)((uintptr_t(base) + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
    want_huge_pages(begin, bytes);
  }
  ~Scratch() {
    if (mapped) munmap(base, mapped);
    else std::free(base);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  U* get() const { return begin; }
};

constexpr int MOST = 25 * LANES;

// A run of an expert's rows, worked on by one thread: `n` rows from row `m0` of expert `e`.
struct Block {
  int e, m0, n;  // n <= MOST
};

template <class T>
struct Problem {
  const Args& a;
  Activation act;
  Order order;
  const int D, F, O, K, W, threads;
  const bool gated, pair_of_tensors;

  explicit Problem(const Args& args)
      : a(args),
        act{int(args.kind), bool(args.gated), args.params[0], limit_of(args), args.params[2], args.params[3] != 0,
            edge_of(limit_of(args), args.params[4])},
        order(args.ids, args.R * args.K, args.E),
        D(args.D), F(args.F), O(args.O), K(args.K), W(args.gated ? 2 * F : F), threads(args.threads),
        gated(args.gated), pair_of_tensors(args.wu) {}

  static float limit_of(const Args& args) { return args.params[1] ? args.params[1] : INFINITY; }
  int count(int e) const { return order.offsets[e + 1] - order.offsets[e]; }
  int live() const { return order.offsets[a.E]; }
  const int32_t* pairs(int e) const { return order.pair_of_row.data() + order.offsets[e]; }
  int slot(int e) const { return a.slots ? a.slots[e] : e; }
  int here(int e) const { return slot(e) < 0 ? 0 : count(e); }  // rows that this call is to compute

  // The stored row of gate f and of up f (one order for weights, biases, h and their gradients).
  int gate_row(int f) const { return gated && a.interleaved ? 2 * f : f; }
  int up_row(int f) const { return a.interleaved ? 2 * f + 1 : F + f; }

  const T* w1_row(int e, int f2) const {
    if (pair_of_tensors && f2 >= F) return (const T*)a.wu + (a.slots ? a.slots_u[e] : e) * a.wu_e + (f2 - F) * a.wu_r;
    return (const T*)a.w1 + slot(e) * a.w1_e + f2 * a.w1_r;
  }
  int64_t w1_r(int f2) const { return pair_of_tensors && f2 >= F ? a.wu_r : a.w1_r; }
  int64_t w1_c(int f2) const { return pair_of_tensors && f2 >= F ? a.wu_c : a.w1_c; }
  const T* w2_row(int e, int o) const { return (const T*)a.w2 + (a.slots ? a.slots_2[e] : e) * a.w2_e + o * a.w2_r; }
  const T* b1(int e) const { return a.b1 ? (const T*)a.b1 + int64_t(slot(e)) * W : nullptr; }
  const T* b2(int e) const { return a.b2 ? (const T*)a.b2 + int64_t(slot(e)) * O : nullptr; }

  float scale(int32_t pair) const { return a.weights[pair]; }

  // x: outputs o .. of the m-th row of expert e
  HG_INLINE void put(T* out, int e, int m, int o, vf x, int left) const {
    const int32_t pair = pairs(e)[m];
    if (a.pairs) store(a.pairs + int64_t(pair) * O + o, x, left);
    else store(out + (int64_t(order.offsets[e]) + m) * O + o, x * scale(pair), left);
  }

  // The rows of an expert that is here, in blocks of about `most`, evenly cut, each a multiple of LANES but the last. No cut leaves a
  // block of one vector, which is summed in another order: results must not depend on the number of threads.
  std::vector<Block> blocks(int first, int last, int most) const {
    std::vector<Block> out;
    for (int e = first; e < last; ++e) {
      int m = count(e), pieces = (m + most - 1) / most;
      if (!m || slot(e) < 0) continue;
      int size = ((m + pieces - 1) / pieces + LANES - 1) / LANES * LANES;
      for (int m0 = 0, n; m0 < m; m0 += n) {
        n = m - m0 <= size + LANES ? m - m0 : size;
        out.push_back({e, m0, n});
      }
    }
    return out;
  }
  // Rows of one task, at most MOST less one vector: many enough that a pass over the weights pays, few enough that
  // every thread has several tasks.
  int block_rows() const {
    int fair = (live() + 3 * threads - 1) / (3 * threads);
    return std::clamp((fair + LANES - 1) / LANES * LANES, 3 * LANES, MOST - LANES);
  }
};

}  // namespace hg
