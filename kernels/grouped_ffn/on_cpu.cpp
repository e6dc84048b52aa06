// grouped_ffn on CPU: how the work is cut into tasks for the threads.
#include <omp.h>

#include "backward.h"
#include "stages.h"
#include "thin.h"

namespace hg {

enum Status { OK = 0, BAD_ID = 1, NO_MEMORY = 2, BAD_DTYPE = 3 };

// Many rows: a task takes a block of an expert's rows through both products while they are hot.
template <class T>
void forward_blocks(const Problem<T>& p, T* out) {
  const int most = p.block_rows(), PD = words<T>(p.D), PF = words<T>(p.F);
  const auto blocks = p.blocks(0, p.a.E, most);
  const size_t xp = panel_floats(most / LANES + 1, PD), ap = panel_floats(most / LANES + 1, PF),
               pack = tiles_floats(std::max(PD, PF));
  Scratch<float> scratch((xp + ap + pack) * p.threads);
#pragma omp parallel num_threads(p.threads)
  {
    float* mine = scratch.get() + (xp + ap + pack) * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < blocks.size(); ++i) {
      const auto [e, m0, n] = blocks[i];
      const int32_t* pair = p.pairs(e) + m0;
      pack_rows<T>(mine, n, p.D, [&](int m) { return (const T*)p.a.rows + int64_t(pair[m] / p.K) * p.a.rows_r; });
      T* h = p.a.h ? (T*)p.a.h + int64_t(p.order.offsets[e]) * p.W : nullptr;
      up_product(p, e, m0, n, 0, p.F, mine, mine + xp, h, mine + xp + ap);
      down_product(p, e, m0, n, 0, p.O, mine + xp, out, mine + xp + ap);
    }
  }
}

// Few rows: reading the weights is the work, so the tasks are cuts of the weights, one product after the other.
template <class T>
void forward_slices(const Problem<T>& p, T* out) {
  using X = typename Thin<T>::X;
  const int PD = words<T>(p.D), PF = words<T>(p.F);
  const auto blocks = p.blocks(0, p.a.E, 1 << 30);
  const bool thin_ok = thin_serves(p);
  auto thin = [&](const Block& b) { return thin_ok && b.n <= THIN<T>; };
  // where each expert's inputs and activations lie: rows for the thin ones, panels for the others (in floats)
  std::vector<size_t> x_at(blocks.size() + 1), a_at(blocks.size() + 1);
  for (size_t i = 0; i < blocks.size(); ++i) {
    const int n = blocks[i].n, vectors = (n + LANES - 1) / LANES;
    const bool copy = !std::is_same_v<T, X>;  // rows already of type X are read where they are
    x_at[i + 1] = x_at[i] + (thin(blocks[i]) ? (copy ? size_t(n) * p.D : 0) : panel_floats(vectors, PD));
    a_at[i + 1] = a_at[i] + (thin(blocks[i]) ? size_t(n) * p.F : panel_floats(vectors, PF));
  }
  const size_t pack = tiles_floats(std::max(PD, PF));
  Scratch<float> xs(x_at.back()), as(a_at.back()), packs(pack * p.threads);
  auto row = [&](const Block& b, int m) {
    return (const T*)p.a.rows + int64_t(p.pairs(b.e)[m] / p.K) * p.a.rows_r;
  };
  const int cuts_f = (p.F + CUT - 1) / CUT, cuts_o = (p.O + CUT - 1) / CUT;
#pragma omp parallel num_threads(p.threads)
  {
    float* mine = packs.get() + pack * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Block& b = blocks[i];
      float* to = xs.get() + x_at[i];
      if (!thin(b)) pack_rows<T>(to, b.n, p.D, [&](int m) { return row(b, m); });
      else if (!std::is_same_v<T, X>)
        for (int m = 0; m < b.n; ++m)
          for (int d = 0; d < p.D; d += LANES) store(to + size_t(m) * p.D + d, load(row(b, m) + d, p.D - d), p.D - d);
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < blocks.size() * cuts_f; ++i) {
      const Block& b = blocks[i / cuts_f];
      const int f0 = int(i % cuts_f) * CUT, f1 = std::min(f0 + CUT, p.F);
      float *x = xs.get() + x_at[i / cuts_f], *a = as.get() + a_at[i / cuts_f];
      T* h = p.a.h ? (T*)p.a.h + int64_t(p.order.offsets[b.e]) * p.W : nullptr;
      if (thin(b)) {
        const X* rows[THIN<T>];
        for (int m = 0; m < b.n; ++m)
          rows[m] = std::is_same_v<T, X> ? (const X*)row(b, m) : (const X*)(x + size_t(m) * p.D);
        thin_up(p, b.e, f0, f1, rows, (X*)a, h);
      } else {
        up_product(p, b.e, 0, b.n, f0, f1, x, a, h, mine);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < blocks.size() * cuts_o; ++i) {
      const Block& b = blocks[i / cuts_o];
      const int o0 = int(i % cuts_o) * CUT, o1 = std::min(o0 + CUT, p.O);
      float* a = as.get() + a_at[i / cuts_o];
      if (thin(b)) {
        const X* rows[THIN<T>];
        for (int m = 0; m < b.n; ++m) rows[m] = (const X*)a + size_t(m) * p.F;
        thin_down(p, b.e, o0, o1, rows, out);
      } else {
        down_product(p, b.e, 0, b.n, o0, o1, a, out, mine);
      }
    }
  }
}

template <class T>
Status forward(const Args& args) {
  Problem<T> p(args);
  if (!p.order.good) return BAD_ID;
  int hit = 0;
  for (int e = 0; e < args.E; ++e) hit += p.count(e) > 0;
  if (args.h) want_huge_pages(args.h, size_t(args.R) * p.K * p.W * sizeof(T));
  Scratch<T> out(size_t(p.live()) * p.O);
  if (p.live() < std::max(24, THIN<T>) * hit || p.live() < 512) forward_slices(p, out.get());
  else forward_blocks(p, out.get());
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t t = 0; t < args.R; ++t) sum_rows(p, out.get(), p.O, (T*)args.y, t, t + 1);
  return OK;
}

// An expert that got no row has no gradient.
template <class T>
void clear_gradients(const Problem<T>& p, int e) {
  auto clear = [&](void* base, int64_t expert, int64_t n) {
    if (base) std::memset((T*)base + e * expert, 0, n * sizeof(T));
  };
  clear(p.a.dw1, p.a.dw1_e, int64_t(p.pair_of_tensors ? p.F : p.W) * p.D);
  clear(p.a.dwu, p.a.dwu_e, int64_t(p.F) * p.D);
  clear(p.a.dw2, p.a.dw2_e, int64_t(p.O) * p.F);
  clear(p.a.db1, p.W, p.W);
  clear(p.a.db2, p.O, p.O);
}

// Experts are taken in waves whose dH and A fit the cache: first the blocks of rows, then the weight gradients.
template <class T>
Status backward(const Args& args) {
  Problem<T> p(args);
  if (!p.order.good) return BAD_ID;
  const int E = int(args.E), most = p.block_rows(), PO = words<T>(p.O), W = p.W;
  const bool weights = args.dw1 || args.dwu || args.dw2 || args.db1 || args.db2;
  const Width<T> width(p);
  for (auto [at, n] : {std::pair(args.dw1, int64_t(W) * p.D), {args.dwu, int64_t(p.F) * p.D}, {args.dw2, int64_t(p.O) * p.F}})
    if (at) want_huge_pages(at, size_t(E) * n * sizeof(T));
  if (args.ds) std::fill_n(args.ds, args.R * p.K, 0.f);

  std::vector<int> waves{0};
  std::vector<size_t> kept_at(E);
  size_t kept = 0, kept_most = 0, most_rows = 0;
  const size_t budget = (4u << 20) / sizeof(float);
  for (int e = 0, tasks = 0; e < E; ++e) {
    if (kept >= budget && tasks >= 2 * p.threads) waves.push_back(e), kept = 0, tasks = 0;
    kept_at[e] = kept;
    kept += Kept<T>::floats(p.count(e), W, p.F);
    tasks += (p.count(e) + most - 1) / most;
    kept_most = std::max(kept_most, kept);
    most_rows = std::max<size_t>(most_rows, p.count(e));
  }
  waves.push_back(E);

  // columns of a weight gradient per task: their panel over all rows of the expert stays in the second-level cache
  const int unit = NVMAX * LANES;
  const int most_words = std::max(1, words<T>(int(most_rows)));
  const int cut = std::clamp(int((512 << 10) / 4 / most_words) / unit, 2, 21) * unit;
  const size_t gp = panel_floats(most / LANES + 1, PO), dp = panel_floats(most / LANES + 1, width.P),
               pack = tiles_floats(std::max(PO, width.P)),
               columns = panel_floats((cut + LANES - 1) / LANES, words<T>(int(most_rows)));
  const size_t each = std::max(gp + dp + pack, columns);
  Scratch<float> scratch(each * p.threads), held(kept_most);
  Scratch<T> dx(args.dx ? size_t(p.live()) * p.D : 0);

  struct Cut { int e; bool down; int c0, n; };
  for (size_t w = 0; w + 1 < waves.size(); ++w) {
    const auto blocks = p.blocks(waves[w], waves[w + 1], most);
    std::vector<Cut> cuts;
    for (int e = waves[w]; e < waves[w + 1]; ++e) {
      if (!p.count(e)) { cuts.push_back({e, false, 0, 0}); continue; }
      if (args.dw2) for (int c = 0; c < p.O; c += cut) cuts.push_back({e, true, c, std::min(cut, p.O - c)});
      if (args.dw1 || args.dwu) for (int c = 0; c < p.D; c += cut) cuts.push_back({e, false, c, std::min(cut, p.D - c)});
      if (args.db1 || args.db2) cuts.push_back({e, false, 0, 0});
    }
    if (!weights) cuts.clear();
#pragma omp parallel num_threads(p.threads)
    {
      float* mine = scratch.get() + each * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < blocks.size(); ++i)
        input_gradients(p, blocks[i], Kept<T>(held.get() + kept_at[blocks[i].e], p.count(blocks[i].e), W), dx.get(), mine,
                        mine + gp, mine + gp + dp);
#pragma omp for schedule(dynamic, 1)
      for (size_t i = 0; i < cuts.size(); ++i) {
        const Cut& c = cuts[i];
        const Kept<T> k(held.get() + kept_at[c.e], p.count(c.e), W);
        if (c.n) weight_gradients(p, c.e, k, c.down, c.c0, c.n, mine);
        else if (p.count(c.e)) bias_gradients(p, c.e, k);
        else clear_gradients(p, c.e);
      }
    }
  }
  if (args.dx)
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t t = 0; t < args.R; ++t) sum_rows(p, dx.get(), p.D, (T*)args.dx, t, t + 1);
  return OK;
}

template <template <class> class Run>
int by_type(const Args& args) {
  try {
    switch (args.dtype) {
      case 0: return Run<float>::run(args);
      case 1: return Run<bf16>::run(args);
      case 2: return Run<f16>::run(args);
      default: return BAD_DTYPE;
    }
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
template <class T>
struct Forward { static int run(const Args& a) { return forward<T>(a); } };
template <class T>
struct Backward { static int run(const Args& a) { return backward<T>(a); } };

}  // namespace hg

extern "C" int hg_grouped_ffn_forward(const hg::Args* args) { return hg::by_type<hg::Forward>(*args); }
extern "C" int hg_grouped_ffn_backward(const hg::Args* args) { return hg::by_type<hg::Backward>(*args); }
