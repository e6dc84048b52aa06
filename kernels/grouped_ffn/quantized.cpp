// grouped_ffn and expert_outputs on frozen weights of few bits: forward only. The form is chosen for each expert by its
// own number of rows, so that experts computed by several calls come out as by one.
#include "quantized_dot.h"

#include <omp.h>

#include "stages.h"

namespace hg {

constexpr int FEW = 16;       // rows of an expert up to which its weights are multiplied as they are read
constexpr int MOST_CUT = 256;  // most rows of weights in a task

// The weights of a call: gate and up, or gate alone; up where it is a tensor of its own; down.
struct Weights {
  FewBits w1, wu, w2;
};

template <class T>
struct FewBitsProblem {
  const Problem<T> p;
  const Weights& w;
  const int scales;  // floats that a row's scales take at most

  FewBitsProblem(const Args& args, const Weights& weights)
      : p(args), w(weights), scales(scale_floats(std::max(p.D, p.F))) {}

  // The tensor that stored row f2 of gate and up lies in, and its row there.
  std::pair<const FewBits&, int> up_at(int f2) const {
    if (w.wu.data && f2 >= p.F) return {w.wu, f2 - p.F};
    return {w.w1, f2};
  }
  std::vector<Block> blocks(bool few) const {
    std::vector<Block> out;
    for (const Block& b : p.blocks(0, p.a.E, 1 << 30))
      if ((b.n <= FEW) == few) out.push_back(b);
    return out;
  }
};

// long cuts read best, but every thread should get several
inline int cut_of(int rows, size_t experts, int threads, int least = UNIT) {
  int size = MOST_CUT;
  while (size > least && int64_t(experts) * ((rows + size - 1) / size) < 4 * threads) size /= 2;
  return size;
}

// A = act(X W1^T + b1), columns f0 .. f1 of expert e, arranged for the next product, into a, a row of inputs for each row.
template <class T>
void few_up(const FewBitsProblem<T>& q, int e, int f0, int f1, const float* const* x, float* a, float* buffer) {
  const Problem<T>& p = q.p;
  const int M = p.count(e), n = f1 - f0;
  const bool paired = p.gated && p.a.interleaved;
  float gates[2 * MOST_CUT * FEW], *ups = gates + n * M, gate[MOST_CUT], up[MOST_CUT];
  auto product = [&](int row, int rows, float* out) {
    const auto [w, at] = q.up_at(row);
    few_bits_product<T>(w, p.slot(e), at, rows, p.D, x, M, out, buffer);
  };
  product(p.gate_row(f0), paired ? 2 * n : n, gates);
  if (p.gated && !paired) product(p.up_row(f0), n, ups);
  const T* b1 = p.b1(e);
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < n; ++i) {
      gate[i] = paired ? gates[m * 2 * n + 2 * i] : gates[m * n + i];
      up[i] = paired ? gates[m * 2 * n + 2 * i + 1] : p.gated ? ups[m * n + i] : 0.f;
      if (!b1) continue;
      gate[i] += to_float(b1[p.gate_row(f0 + i)]);
      if (p.gated) up[i] += to_float(b1[p.up_row(f0 + i)]);
    }
    for (int i = 0; i < n; i += LANES)
      store(gate + i, p.act.forward(load(gate + i, n - i), load(up + i, n - i)), n - i);
    arrange<T>(a + size_t(m) * input_floats<T>(p.F, q.w.w2), gate, f0, n, p.F, q.w.w2);
  }
}

// outputs o0 .. o1 of A W2^T + b2
template <class T>
void few_down(const FewBitsProblem<T>& q, int e, int o0, int o1, const float* const* a, T* out, float* buffer) {
  const Problem<T>& p = q.p;
  const int M = p.count(e), n = o1 - o0;
  float sums[MOST_CUT * FEW];
  few_bits_product<T>(q.w.w2, p.slot(e), o0, n, p.F, a, M, sums, buffer);
  const T* b2 = p.b2(e);
  for (int m = 0; m < M; ++m)
    for (int o = 0; o < n; o += LANES) {
      vf x = load(sums + m * n + o, n - o);
      if (b2) x = x + load(b2 + o0 + o, n - o);
      p.put(out, e, m, o0 + o, x, n - o);
    }
}

// Experts of few rows: tasks are cuts of the weights, one product after the other.
template <class T>
void few_rows(const FewBitsProblem<T>& q, T* out) {
  const Problem<T>& p = q.p;
  const auto blocks = q.blocks(true);
  if (blocks.empty()) return;
  const int PD = input_floats<T>(p.D, q.w.w1), PF = input_floats<T>(p.F, q.w.w2);
  std::vector<size_t> a_at(blocks.size() + 1);
  for (size_t i = 0; i < blocks.size(); ++i) a_at[i + 1] = a_at[i] + size_t(blocks[i].n) * PF;
  const size_t each = p.D + 2 * size_t(q.scales);  // a thread's row of inputs and scales of two rows
  Scratch<float> xs(size_t(p.a.R) * PD), as(a_at.back()), scratch(each * p.threads);
  const int cut_f = cut_of(p.F, blocks.size(), p.threads, int(q.w.w2.group));
  const int cut_o = cut_of(p.O, blocks.size(), p.threads);
  const int cuts_f = (p.F + cut_f - 1) / cut_f, cuts_o = (p.O + cut_o - 1) / cut_o;
#pragma omp parallel num_threads(p.threads)
  {
    float *row = scratch.get() + each * omp_get_thread_num(), *scales = row + p.D;
    const float* in[FEW];
#pragma omp for schedule(static)
    for (int64_t t = 0; t < p.a.R; ++t) {
      const T* from = (const T*)p.a.rows + t * p.a.rows_r;
      for (int d = 0; d < p.D; d += LANES) store(row + d, load(from + d, p.D - d), p.D - d);
      arrange<T>(xs.get() + size_t(t) * PD, row, 0, p.D, p.D, q.w.w1);
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < blocks.size() * cuts_f; ++i) {
      const Block& b = blocks[i / cuts_f];
      const int f0 = int(i % cuts_f) * cut_f, f1 = std::min(f0 + cut_f, p.F);
      for (int m = 0; m < b.n; ++m) in[m] = xs.get() + size_t(p.pairs(b.e)[m] / p.K) * PD;
      few_up(q, b.e, f0, f1, in, as.get() + a_at[i / cuts_f], scales);
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < blocks.size() * cuts_o; ++i) {
      const Block& b = blocks[i / cuts_o];
      const int o0 = int(i % cuts_o) * cut_o, o1 = std::min(o0 + cut_o, p.O);
      for (int m = 0; m < b.n; ++m) in[m] = as.get() + a_at[i / cuts_o] + size_t(m) * PF;
      few_down(q, b.e, o0, o1, in, out, scales);
    }
  }
}

// An expert of many rows, alone: a problem of one expert, whose weights are widened, cut by cut, by the task that
// multiplies with them. S is what the products read (gemm.h): floats, or bf16 where the CPU multiplies that.
template <class T>
struct ManyRows {
  using S = typename Form<T>::S;
  const FewBitsProblem<T>& q;
  const Problem<T>& p;
  const int PD, PF;
  Scratch<S> w1, w2, x, b1, b2;
  Scratch<float> y, panels, acts, packs;
  const size_t pack;
  std::vector<int32_t> ids;

  ManyRows(const FewBitsProblem<T>& problem, int most)
      : q(problem), p(q.p), PD(words<S>(p.D)), PF(words<S>(p.F)), w1(size_t(p.W) * p.D), w2(size_t(p.O) * p.F),
        x(size_t(most) * p.D), b1(p.W), b2(p.O), y(size_t(most) * p.O), panels(panel_floats(most / LANES + 1, PD)),
        acts(panel_floats(most / LANES + 1, PF)), packs((tiles_floats(std::max(PD, PF)) + q.scales) * p.threads),
        pack(tiles_floats(std::max(PD, PF)) + q.scales), ids(most) {}

  Args alone(const Block& b) {
    Args a = p.a;
    a.R = b.n, a.K = 1, a.E = 1, a.ids = ids.data(), a.rows = x.get(), a.rows_r = p.D;
    a.w1 = w1.get(), a.w1_r = p.D, a.w1_c = 1, a.w2 = w2.get(), a.w2_r = p.F, a.w2_c = 1, a.wu = nullptr;
    a.b1 = narrow(p.b1(b.e), p.W, b1.get()), a.b2 = narrow(p.b2(b.e), p.O, b2.get());
    a.slots = nullptr, a.pairs = y.get();
    return a;
  }
  static const void* narrow(const T* from, int n, S* to) {
    for (int i = 0; from && i < n; ++i) from_float(to_float(from[i]), to[i]);
    return from ? to : nullptr;
  }

  void run(const Block& b, T* out) {
    const Args args = alone(b);
    const Problem<S> one(args);
    const int vectors = (b.n + LANES - 1) / LANES, groups = (vectors + NVMAX - 1) / NVMAX;
    const int cut_f = std::min(cut_of(p.F, 1, p.threads), 128), cut_o = std::min(cut_of(p.O, 1, p.threads), 128);
#pragma omp parallel num_threads(p.threads)
    {
      float *mine = packs.get() + pack * omp_get_thread_num(), *scales = mine + pack - q.scales;
#pragma omp for schedule(static)
      for (int g = 0; g < groups; ++g) gather(b, g, vectors);
#pragma omp for schedule(dynamic, 1)
      for (int f0 = 0; f0 < p.F; f0 += cut_f) {
        const int f1 = std::min(f0 + cut_f, p.F);
        for (int f = f0; f < f1; ++f) {
          widen_up(b.e, p.gate_row(f), scales);
          if (p.gated) widen_up(b.e, p.up_row(f), scales);
        }
        up_product<S>(one, 0, 0, b.n, f0, f1, panels.get(), acts.get(), nullptr, mine);
      }
#pragma omp for schedule(dynamic, 1)
      for (int o0 = 0; o0 < p.O; o0 += cut_o) {
        const int o1 = std::min(o0 + cut_o, p.O);
        for (int o = o0; o < o1; ++o) widen(w2.get() + size_t(o) * p.F, q.w.w2, p.slot(b.e), o, p.F, scales);
        down_product<S>(one, 0, 0, b.n, o0, o1, acts.get(), nullptr, mine);
        for (int m = 0; m < b.n; ++m)
          for (int o = o0; o < o1; o += LANES)
            p.put(out, b.e, m, o, load(y.get() + size_t(m) * p.O + o, o1 - o), o1 - o);
      }
    }
  }
  void widen_up(int e, int f2, float* scales) {
    const auto [w, at] = q.up_at(f2);
    widen(w1.get() + size_t(f2) * p.D, w, p.slot(e), at, p.D, scales);
  }
  // The g-th panel of inputs; the last takes what Panels has it share.
  void gather(const Block& b, int g, int vectors) {
    const int v0 = g * NVMAX, m0 = v0 * LANES;
    if (g && vectors - (v0 - NVMAX) <= NVMAX + 1) return;
    const int m1 = vectors - v0 <= NVMAX + 1 ? b.n : m0 + NVMAX * LANES;
    for (int m = m0; m < m1; ++m) {
      const T* from = (const T*)p.a.rows + int64_t(p.pairs(b.e)[m] / p.K) * p.a.rows_r;
      for (int d = 0; d < p.D; d += LANES) store(x.get() + size_t(m) * p.D + d, load(from + d, p.D - d), p.D - d);
    }
    pack_rows<S>(panels.get() + panel_floats(v0, PD), m1 - m0, p.D,
                 [&](int m) { return x.get() + size_t(m0 + m) * p.D; });
  }
};

template <class T>
int few_bits_forward(const Args& args, const Weights& weights) {
  const FewBitsProblem<T> q(args, weights);
  if (!q.p.order.good) return 1;
  Scratch<T> out(args.pairs ? 0 : size_t(q.p.live()) * q.p.O);
  few_rows(q, out.get());
  const auto many = q.blocks(false);
  if (!many.empty()) {
    int most = 0;
    for (const Block& b : many) most = std::max(most, b.n);
    ManyRows<T> form(q, most);
    for (const Block& b : many) form.run(b, out.get());
  }
  if (args.pairs) return 0;
#pragma omp parallel for num_threads(q.p.threads) schedule(static)
  for (int64_t t = 0; t < args.R; ++t) sum_rows(q.p, out.get(), q.p.O, (T*)args.y, t, t + 1);
  return 0;
}

}  // namespace hg

// Returns as hg_grouped_ffn_forward does; of `args` the weights' addresses are not looked at.
extern "C" int hg_grouped_ffn_quantized(const hg::Args* args, const hg::Weights* weights) {
  try {
    switch (args->dtype) {
      case 0: return hg::few_bits_forward<float>(*args, *weights);
      case 1: return hg::few_bits_forward<hg::bf16>(*args, *weights);
      case 2: return hg::few_bits_forward<hg::f16>(*args, *weights);
      default: return 3;
    }
  } catch (const std::bad_alloc&) {
    return 2;
  }
}
