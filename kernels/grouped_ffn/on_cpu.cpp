// grouped_ffn on CPU: forward.
#include <omp.h>

#include "stages.h"

namespace hg {

enum Status { OK = 0, BAD_ID = 1, NO_MEMORY = 2, BAD_DTYPE = 3 };

// Many rows: a task takes a block of an expert's rows through both products while they are hot.
template <class T>
void forward_blocks(const Problem<T>& p, T* out) {
  const int most = p.block_rows(), PD = words<T>(p.D), PF = words<T>(p.F);
  const auto blocks = p.blocks(0, p.a.E, most);
  const size_t xp = panel_floats<T>(most / LANES, PD), ap = panel_floats<T>(most / LANES, PF),
               pack = tiles_floats<T>(std::max(PD, PF));
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
  const int PD = words<T>(p.D), PF = words<T>(p.F);
  const auto blocks = p.blocks(0, p.a.E, 1 << 30);
  std::vector<size_t> xp_at(blocks.size() + 1), ap_at(blocks.size() + 1);
  for (size_t i = 0; i < blocks.size(); ++i) {
    int vectors = (blocks[i].n + LANES - 1) / LANES;
    xp_at[i + 1] = xp_at[i] + panel_floats<T>(vectors, PD);
    ap_at[i + 1] = ap_at[i] + panel_floats<T>(vectors, PF);
  }
  const size_t pack = tiles_floats<T>(std::max(PD, PF));
  Scratch<float> xp(xp_at.back()), ap(ap_at.back()), packs(pack * p.threads);
  const int unit = 64;
  const int f_cuts = (p.F + unit - 1) / unit, o_cuts = (p.O + unit - 1) / unit;
#pragma omp parallel num_threads(p.threads)
  {
    float* mine = packs.get() + pack * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < blocks.size(); ++i) {
      const int32_t* pair = p.pairs(blocks[i].e);
      pack_rows<T>(xp.get() + xp_at[i], blocks[i].n, p.D,
                   [&](int m) { return (const T*)p.a.rows + int64_t(pair[m] / p.K) * p.a.rows_r; });
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < blocks.size() * f_cuts; ++i) {
      const Block b = blocks[i / f_cuts];
      const int f = int(i % f_cuts) * unit;
      T* h = p.a.h ? (T*)p.a.h + int64_t(p.order.offsets[b.e]) * p.W : nullptr;
      up_product(p, b.e, 0, b.n, f, std::min(f + unit, p.F), xp.get() + xp_at[i / f_cuts], ap.get() + ap_at[i / f_cuts], h, mine);
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < blocks.size() * o_cuts; ++i) {
      const Block b = blocks[i / o_cuts];
      const int o = int(i % o_cuts) * unit;
      down_product(p, b.e, 0, b.n, o, std::min(o + unit, p.O), ap.get() + ap_at[i / o_cuts], out, mine);
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
  if (p.live() < 24 * hit || (hit < 3 * p.threads && p.live() < 256 * p.threads)) forward_slices(p, out.get());
  else forward_blocks(p, out.get());
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t t = 0; t < args.R; ++t) sum_rows(p, out.get(), p.O, (T*)args.y, t, t + 1);
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

}  // namespace hg

extern "C" int hg_grouped_ffn_forward(const hg::Args* args) { return hg::by_type<hg::Forward>(*args); }
