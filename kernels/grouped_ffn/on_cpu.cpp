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

// Experts worked on together, and the parts that their intermediate columns are taken in.
struct Wave {
  int first, last, part;  // experts first .. last, `part` columns at a time
};

// Waves whose dH and A about fit the cache, with several tasks for every thread.
template <class T>
std::vector<Wave> waves(const Problem<T>& p, int block) {
  const size_t budget = (size_t(1) << 20) * (p.threads + 1) / sizeof(float);
  const Part<T> all(p, 0, p.F);
  std::vector<Wave> out;
  size_t kept = 0;
  for (int e = 0, first = 0, tasks = 0; e < p.a.E; ++e) {
    kept += Kept<T>::floats(p.count(e), all);
    tasks += (p.count(e) + block - 1) / block;
    if (e + 1 < p.a.E && (kept < budget || tasks < 2 * p.threads)) continue;
    const int parts = std::clamp(int(kept / budget), 1, std::max(1, p.F / 512));
    out.push_back({first, e + 1, ((p.F + parts - 1) / parts + CHUNK - 1) / CHUNK * CHUNK});
    first = e + 1, kept = 0, tasks = 0;
  }
  return out;
}

template <class T>
Status backward(const Args& args) {
  Problem<T> p(args);
  if (!p.order.good) return BAD_ID;
  const int E = int(args.E), most = p.block_rows(), PO = words<T>(p.O);
  const bool matrices = args.dw1 || args.dwu || args.dw2, biases = args.db1 || args.db2;
  for (auto [at, n] : {std::pair(args.dw1, int64_t(p.W) * p.D), {args.dwu, int64_t(p.F) * p.D}, {args.dw2, int64_t(p.O) * p.F}})
    if (at) want_huge_pages(at, size_t(E) * n * sizeof(T));
  if (args.ds) std::fill_n(args.ds, args.R * p.K, 0.f);

  const auto all_waves = waves(p, most);
  size_t kept_most = 0, wave_rows = 0, most_rows = 0;
  int PH = 0;
  for (const Wave& w : all_waves) {
    const Part<T> part(p, 0, std::min(w.part, p.F));
    size_t kept = 0;
    for (int e = w.first; e < w.last; ++e) {
      kept += Kept<T>::floats(p.count(e), part);
      most_rows = std::max<size_t>(most_rows, p.count(e));
    }
    kept_most = std::max(kept_most, kept);
    wave_rows = std::max<size_t>(wave_rows, p.order.offsets[w.last] - p.order.offsets[w.first]);
    PH = std::max(PH, part.words());
  }
  // columns of a weight gradient per task: their panel over all rows of the expert stays in the second-level cache
  const int unit = NVMAX * LANES, row_words = std::max(1, words<T>(int(most_rows)));
  const int cut = std::clamp(int((512 << 10) / 4 / row_words) / unit, 2, 21) * unit;
  const size_t gp = panel_floats(most / LANES + 1, PO), dp = panel_floats(most / LANES + 1, PH),
               pack = tiles_floats(std::max(PO, PH)), columns = panel_floats((cut + LANES - 1) / LANES, row_words);
  const size_t each = std::max(gp + dp + pack, columns);
  Scratch<float> scratch(each * p.threads), held(kept_most), rows(args.dx ? wave_rows * p.D : 0);
  InputSum<T> dx(p);

  struct Cut { int e; bool down; int c0, n; };
  std::vector<size_t> kept_at(E);
  for (const Wave& w : all_waves) {
    const auto blocks = p.blocks(w.first, w.last, most);
    const int lo = p.order.offsets[w.first], hi = p.order.offsets[w.last];
    std::vector<Cut> cuts;
    for (int e = w.first; e < w.last; ++e) {
      if (!p.count(e)) { cuts.push_back({e, false, 0, 0}); continue; }
      if (args.dw2) for (int c = 0; c < p.O; c += cut) cuts.push_back({e, true, c, std::min(cut, p.O - c)});
      if (args.dw1 || args.dwu) for (int c = 0; c < p.D; c += cut) cuts.push_back({e, false, c, std::min(cut, p.D - c)});
      if (biases) cuts.push_back({e, false, 0, 0});
    }
    if (!matrices && !biases) cuts.clear();
    for (int f0 = 0; f0 < p.F; f0 += w.part) {
      const Part<T> part(p, f0, std::min(w.part, p.F - f0));
      const bool first = w.first == 0 && f0 == 0, last = f0 + w.part >= p.F;
      size_t end = 0;
      for (int e = w.first; e < w.last; ++e) kept_at[e] = end, end += Kept<T>::floats(p.count(e), part);
#pragma omp parallel num_threads(p.threads)
      {
        float* mine = scratch.get() + each * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < blocks.size(); ++i) {
          const Block& b = blocks[i];
          float* to = args.dx ? rows.get() + size_t(p.order.offsets[b.e] - lo + b.m0) * p.D : nullptr;
          input_gradients(part, b, Kept<T>(held.get() + kept_at[b.e], p.count(b.e), part), to, mine, mine + gp, mine + gp + dp);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (size_t i = 0; i < cuts.size(); ++i) {
          const Cut& c = cuts[i];
          const Kept<T> k(held.get() + kept_at[c.e], p.count(c.e), part);
          if (c.n) weight_gradients(part, c.e, k, c.down, c.c0, c.n, mine);
          else if (p.count(c.e)) bias_gradients(part, c.e, k);
          else if (f0 == 0) clear_gradients(p, c.e);
        }
        if (args.dx) {
#pragma omp for schedule(dynamic, 64)
          for (int64_t t = 0; t < args.R; ++t) {
            if (first) dx.begin(t);
            dx.add(t, rows.get(), lo, hi, last);
            if (w.last == E && last) dx.end(t);
          }
        }
      }
    }
  }
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
