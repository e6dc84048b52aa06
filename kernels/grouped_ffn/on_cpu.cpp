// grouped_ffn on CPU: how the work is cut into tasks for the threads.
#include <omp.h>

#include "backward.h"
#include "stages.h"
#include "thin.h"

namespace hg {

enum Status { OK = 0, BAD_ID = 1, NO_MEMORY = 2, BAD_DTYPE = 3 };

inline bool asks_outputs(const Args& a) { return a.y || a.pairs; }

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
      if (asks_outputs(p.a)) down_product(p, e, m0, n, 0, p.O, mine + xp, out, mine + xp + ap);
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
  // long cuts read best, but every thread should get several
  auto cut = [&](int rows) {
    int size = CUT;
    while (size > 32 && int64_t(blocks.size()) * ((rows + size - 1) / size) < 4 * p.threads) size /= 2;
    return size;
  };
  const int cut_f = cut(p.F), cut_o = cut(p.O), cuts_f = (p.F + cut_f - 1) / cut_f, cuts_o = (p.O + cut_o - 1) / cut_o;
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
      const int f0 = int(i % cuts_f) * cut_f, f1 = std::min(f0 + cut_f, p.F);
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
    for (size_t i = 0; i < (asks_outputs(p.a) ? blocks.size() * cuts_o : 0); ++i) {
      const Block& b = blocks[i / cuts_o];
      const int o0 = int(i % cuts_o) * cut_o, o1 = std::min(o0 + cut_o, p.O);
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
  // the choice of a form goes by the whole routing, so that experts computed by several calls come out as by one
  int hit = 0;
  for (int e = 0; e < args.E; ++e) hit += p.count(e) > 0;
  if (args.h) want_huge_pages(args.h, size_t(args.R) * p.K * p.W * sizeof(T));
  Scratch<T> out(args.y ? size_t(p.live()) * p.O : 0);
  if (p.live() < std::max(24, THIN<T>) * hit || p.live() < 512) forward_slices(p, out.get());
  else forward_blocks(p, out.get());
  if (!args.y) return OK;
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

// Intermediate columns taken at a time: by F alone, so that results do not depend on the number of threads.
inline int part_columns(int F) {
  const int parts = F <= 1024 ? 1 : (F + 767) / 768;
  return ((F + parts - 1) / parts + CHUNK - 1) / CHUNK * CHUNK;
}

// Experts worked on together: first .. last, such that dH and A of a part about fit the cache and every thread has
// several tasks.
struct Wave {
  int first, last;
};

template <class T>
std::vector<Wave> waves(const Problem<T>& p, const Part<T>& part, int block) {
  const size_t budget = (size_t(1) << 20) * (p.threads + 1) / sizeof(float);
  std::vector<Wave> out;
  size_t kept = 0;
  for (int e = 0, first = 0, tasks = 0; e < p.a.E; ++e) {
    kept += Kept<T>::floats(p.here(e), part);
    tasks += (p.here(e) + block - 1) / block;
    if (e + 1 < p.a.E && (kept < budget || tasks < 2 * p.threads)) continue;
    out.push_back({first, e + 1});
    first = e + 1, kept = 0, tasks = 0;
  }
  return out;
}

// A cut of the weight gradients of an expert: columns c0 .. c0+n of dW1 (or of dW2: `down`); n = 0: the biases, or
// zeros where the expert got no row.
struct Cut {
  int e;
  bool down;
  int c0, n;
};

template <class T>
std::vector<Cut> cuts(const Problem<T>& p, const Wave& w, int size) {
  std::vector<Cut> out;
  const bool up = p.a.dw1 || p.a.dwu, biases = p.a.db1 || p.a.db2;
  for (int e = w.first; e < w.last; ++e) {
    const bool any = p.count(e) > 0;
    for (int c = 0; any && p.a.dw2 && c < p.O; c += size) out.push_back({e, true, c, std::min(size, p.O - c)});
    for (int c = 0; any && up && c < p.D; c += size) out.push_back({e, false, c, std::min(size, p.D - c)});
    if (!any || biases) out.push_back({e, false, 0, 0});
  }
  return out;
}

// Sizes of the scratch space of a backward pass, in floats.
template <class T>
struct Space {
  size_t gp, dp, pack, each;  // a thread's panels and packed tiles
  size_t kept = 0, rows = 0;  // a wave's
  int cut;                    // columns of a weight gradient per task: their panel over all rows fits the second cache

  Space(const Problem<T>& p, const std::vector<Wave>& all, const Part<T>& part, int block) {
    int most = 1;
    for (const Wave& w : all) {
      size_t here = 0;
      for (int e = w.first; e < w.last; ++e) {
        here += Kept<T>::floats(p.here(e), part);
        most = std::max(most, p.here(e));
      }
      kept = std::max(kept, here);
      rows = std::max<size_t>(rows, p.order.offsets[w.last] - p.order.offsets[w.first]);
    }
    constexpr int unit = NVMAX * LANES;
    cut = std::clamp((128 << 10) / words<T>(most) / unit, 2, 21) * unit;
    gp = panel_floats(block / LANES + 1, words<T>(p.O));
    dp = panel_floats(block / LANES + 1, part.words());
    pack = tiles_floats(std::max(words<T>(p.O), part.words()));
    each = std::max(gp + dp + pack, panel_floats((cut + LANES - 1) / LANES, words<T>(most)));
  }
};

template <class T>
Status backward(const Args& args) {
  Problem<T> p(args);
  if (!p.order.good) return BAD_ID;
  for (auto [at, n] :
       {std::pair(args.dw1, int64_t(p.W) * p.D), {args.dwu, int64_t(p.F) * p.D}, {args.dw2, int64_t(p.O) * p.F}})
    if (at) want_huge_pages(at, size_t(args.E) * n * sizeof(T));
  if (args.ds && !args.slots) std::fill_n(args.ds, args.R * p.K, 0.f);
  const bool gradients_of_weights = args.dw1 || args.dwu || args.dw2 || args.db1 || args.db2;

  const int columns = part_columns(p.F), block = p.block_rows();
  const Part<T> widest(p, 0, std::min(columns, p.F));
  const auto all = waves(p, widest, block);
  const Space<T> space(p, all, widest, block);
  Scratch<float> scratch(space.each * p.threads), held(space.kept), rows(args.dx ? space.rows * p.D : 0);
  InputSum<T> dx(p);
  std::vector<size_t> kept_at(args.E);

  for (const Wave& w : all) {
    const auto blocks = p.blocks(w.first, w.last, block);
    const auto parts_of_weights = gradients_of_weights ? cuts(p, w, space.cut) : std::vector<Cut>{};
    const int lo = p.order.offsets[w.first], hi = p.order.offsets[w.last];
    for (int f0 = 0; f0 < p.F; f0 += columns) {
      const Part<T> part(p, f0, std::min(columns, p.F - f0));
      const bool last = f0 + columns >= p.F;
      size_t end = 0;
      for (int e = w.first; e < w.last; ++e) kept_at[e] = end, end += Kept<T>::floats(p.here(e), part);
      auto kept = [&](int e) { return Kept<T>(held.get() + kept_at[e], p.count(e), part); };
#pragma omp parallel num_threads(p.threads)
      {
        float *gp = scratch.get() + space.each * omp_get_thread_num(), *dp = gp + space.gp, *pack = dp + space.dp;
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < blocks.size(); ++i) {
          const Block& b = blocks[i];
          hidden_gradients(part, b, kept(b.e), gp, dp, pack);
          float* to = args.dx ? rows.get() + size_t(p.order.offsets[b.e] - lo + b.m0) * p.D : nullptr;
          if (args.dx || args.pairs) input_gradients(part, b, dp, to, pack);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (size_t i = 0; i < parts_of_weights.size(); ++i) {
          const Cut& c = parts_of_weights[i];
          if (c.n) weight_gradients(part, c.e, kept(c.e), c.down, c.c0, c.n, gp);
          else if (p.count(c.e)) bias_gradients(part, c.e, kept(c.e));
          else if (f0 == 0) clear_gradients(p, c.e);
        }
        if (args.dx && last) {
#pragma omp for schedule(dynamic, 64)
          for (int64_t t = 0; t < args.R; ++t) {
            if (w.first == 0) dx.begin(t);
            dx.add(t, rows.get(), lo, hi);
            if (w.last == args.E) dx.end(t);
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
