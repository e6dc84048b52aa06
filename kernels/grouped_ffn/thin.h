// Products with few rows (decoding): every weight is used a few times, so reading the weights once, in place, at the
// memory's rate is all there is to do. Lanes run along the weights as they lie in memory:
//
//     rows side by side along the contraction   dot products, summed across the lanes at the end
//     rows side by side along the output        multiples of input elements added up, a lane an output
#pragma once
#include "problem.h"

namespace hg {

constexpr int CUT = 256;  // most rows of weights in a task
// Rows of an expert up to which this is taken instead of panels. fp16 gains most, because its panels want the weights
// converted and transposed first (32 rows at D = 1024: 47 ms against 74); the others change over about where multiplying
// would take longer than reading, by reckoning.
template <class T>
constexpr int THIN = std::is_same_v<T, f16> ? 48 : 12;

// bf16 is multiplied in pairs where the CPU can; everything else as floats.
template <class T>
struct Thin {
#ifdef HG_BF16_DOT
  static constexpr bool PAIR = std::is_same_v<T, bf16>;
#else
  static constexpr bool PAIR = false;
#endif
  using X = std::conditional_t<PAIR, bf16, float>;
  static constexpr int STEP = PAIR ? 2 * LANES : LANES;
  template <class U>
  static HG_INLINE vf get(const U* p, int n) {
#ifdef HG_BF16_DOT
    if constexpr (PAIR) return (vf)_mm512_maskz_loadu_epi16(mask32(n), p);
#endif
    return load(p, n);
  }
  static HG_INLINE vf add(vf sum, vf w, vf x) {
#ifdef HG_BF16_DOT
    if constexpr (PAIR) return Pair::dot(sum, w, x);
#endif
    return multiply_add(w, x, sum);
  }
};

template <class T>
using Inputs = const typename Thin<T>::X* const*;  // addresses of input rows

// Rows are read two at a time, but the memory is asked for in the order in which it lies: a single stream, AHEAD bytes
// early. (Letting the hardware guess from several short streams reads at half the rate.)
constexpr int AHEAD = 8192;

// out[m * stride + i] = <row i, x[m]> for two rows `r` apart (or one) and M inputs
template <class T, int M>
__attribute__((noinline)) void dot_rows(const T* w, int64_t r, int rows, int len, Inputs<T> x,
                                        float* out, int stride) {
  using H = Thin<T>;
  constexpr int BYTES = 2 * H::STEP * sizeof(T);  // read at a time
  constexpr int U = M == 1 ? 4 : M <= 4 ? 2 : 1;  // sums enough to hide the latency of an addition
  vf a[U][M] = {}, b[U][M] = {};
  const T *w0 = w, *w1 = rows > 1 ? w + r : w;
  const char* next = (const char*)w + AHEAD;
  int p = 0;
  for (; p + U * H::STEP <= len; p += U * H::STEP)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u, next += BYTES) {
      const int at = p + u * H::STEP;
      prefetch(next);
      if (BYTES > 64) prefetch(next + 64);
      const vf x0 = H::get(w0 + at, H::STEP), x1 = H::get(w1 + at, H::STEP);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const vf in = H::get(x[m] + at, H::STEP);
        a[u][m] = H::add(a[u][m], x0, in);
        b[u][m] = H::add(b[u][m], x1, in);
      }
    }
  for (; p < len; p += H::STEP) {
    const vf x0 = H::get(w0 + p, len - p), x1 = H::get(w1 + p, len - p);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const vf in = H::get(x[m] + p, len - p);
      a[0][m] = H::add(a[0][m], x0, in);
      b[0][m] = H::add(b[0][m], x1, in);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int u = 1; u < U; ++u) a[0][m] = a[0][m] + a[u][m], b[0][m] = b[0][m] + b[u][m];
    out[m * stride] = sum(a[0][m]);
    if (rows > 1) out[m * stride + 1] = sum(b[0][m]);
  }
}

template <class T, int M>
void dot_all(const T* w, int64_t r, int rows, int len, Inputs<T> x, float* out, int stride) {
  for (int i = 0; i < rows; i += 2) dot_rows<T, M>(w + i * r, r, rows - i, len, x, out + i, stride);
}

// The same with outputs side by side (element (row i, input p) at w + i + p * c).
template <class T, int M>
__attribute__((noinline)) void sum_columns(const T* w, int64_t c, int rows, int len, Inputs<T> x,
                                           float* out, int stride) {
  using H = Thin<T>;
  constexpr int NV = M <= 2 ? 8 : 4;  // vectors of outputs at a time
  constexpr int WIDE = NV * LANES;
  for (int i = 0; i < rows; i += WIDE) {
    vf sum[M][NV] = {};
    const int left = rows - i;
    for (int p = 0; p < len; p += H::PAIR ? 2 : 1) {
      const T *a = w + i + p * c, *b = p + 1 < len ? a + c : nullptr;
      for (int v = 0; v < NV; v += 2) prefetch(a + 16 * c + v * LANES);
      vf xs[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        if constexpr (H::PAIR) {
          uint32_t word = x[m][p].bits | (b ? uint32_t(x[m][p + 1].bits) << 16 : 0);
          float f;
          std::memcpy(&f, &word, 4);
          xs[m] = splat(f);
        } else {
          xs[m] = splat(x[m][p]);
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        vf ws;
        if constexpr (H::PAIR) ws = column_words<T>(a + v * LANES, b ? b + v * LANES : nullptr, left - v * LANES);
        else ws = load(a + v * LANES, left - v * LANES);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) sum[m][v] = H::add(sum[m][v], ws, xs[m]);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < NV; ++v) store(out + m * stride + i + v * LANES, sum[m][v], left - v * LANES);
  }
}

template <class T, int M>
void thin_inputs(const T* w, int64_t r, int64_t c, int rows, int len, Inputs<T> x, float* out, int stride) {
  if (c == 1) return dot_all<T, M>(w, r, rows, len, x, out, stride);
  constexpr int half = M > 4 ? M / 2 : M;  // more would not fit the registers
  sum_columns<T, half>(w, c, rows, len, x, out, stride);
  if constexpr (half < M) sum_columns<T, M - half>(w, c, rows, len, x + half, out + half * stride, stride);
}

// out[m * rows + i] = <row i, x[m]>, i < rows: weights with strides r (rows) and c (contraction), one of them 1.
template <class T>
void thin_product(const T* w, int64_t r, int64_t c, int rows, int len, Inputs<T> x, int M, float* out) {
  using Product = void (*)(const T*, int64_t, int64_t, int, int, Inputs<T>, float*, int);
  static constexpr Product product[] = {thin_inputs<T, 1>, thin_inputs<T, 2>, thin_inputs<T, 3>, thin_inputs<T, 4>,
                                        thin_inputs<T, 5>, thin_inputs<T, 6>, thin_inputs<T, 7>, thin_inputs<T, 8>};
  if (M <= 8) return product[M - 1](w, r, c, rows, len, x, out, rows);
  // several passes, over cuts of the weights small enough for all but the first to read them from the cache
  const int cut = std::max(8, int(16384 / sizeof(T)) / std::max(1, len) & ~7), passes = (M + 7) / 8;
  for (int i = 0; i < rows; i += cut)
    for (int pass = 0, m = 0, n; pass < passes; ++pass, m += n) {
      n = (M - m) / (passes - pass);
      product[n - 1](w + i * r, r, c, std::min(cut, rows - i), len, x + m, out + m * rows + i, rows);
    }
}

template <class T>
bool thin_serves(const Problem<T>& p) {
  const Args& a = p.a;
  return (a.w1_c == 1 || a.w1_r == 1) && (!a.wu || a.wu_c == 1 || a.wu_r == 1) && (a.w2_c == 1 || a.w2_r == 1);
}

// A = act(X W1^T + b1), columns f0 .. f1 of expert e, into a [rows, F]; the pre-activation to h where kept.
template <class T>
void thin_up(const Problem<T>& p, int e, int f0, int f1, Inputs<T> x, typename Thin<T>::X* a, T* h) {
  const int M = p.count(e), n = f1 - f0, at = p.gate_row(f0), ut = p.up_row(f0);
  const bool paired = p.gated && p.a.interleaved;
  float gates[2 * CUT * THIN<T>], *ups = gates + n * M, both[2 * CUT];
  thin_product(p.w1_row(e, at), p.w1_r(at), p.w1_c(at), paired ? 2 * n : n, p.D, x, M, gates);
  if (p.gated && !paired) thin_product(p.w1_row(e, ut), p.w1_r(ut), p.w1_c(ut), n, p.D, x, M, ups);
  const T* b1 = p.b1(e);
  for (int m = 0; m < M; ++m) {
    float *gate = gates + m * n, *up = p.gated ? ups + m * n : gate;
    if (paired) {  // apart, so that what follows need not know
      gate = both, up = both + n;
      for (int i = 0; i < n; ++i) gate[i] = gates[m * 2 * n + 2 * i], up[i] = gates[m * 2 * n + 2 * i + 1];
    }
    for (int i = 0; b1 && i < n; ++i) {
      gate[i] += to_float(b1[p.gate_row(f0 + i)]);
      if (p.gated) up[i] += to_float(b1[p.up_row(f0 + i)]);
    }
    for (int i = 0; h && i < n; ++i) {
      from_float(gate[i], h[int64_t(p.gate_row(f0 + i)) * M + m]);
      if (p.gated) from_float(up[i], h[int64_t(p.up_row(f0 + i)) * M + m]);
    }
    for (int i = 0; i < n; i += LANES)
      store(a + int64_t(m) * p.F + f0 + i, p.act.forward(load(gate + i, n - i), load(up + i, n - i)), n - i);
  }
}

// A W2^T + b2, outputs o0 .. o1, to where Problem::put has it
template <class T>
void thin_down(const Problem<T>& p, int e, int o0, int o1, Inputs<T> a, T* out) {
  const int M = p.count(e), n = o1 - o0;
  float buffer[CUT * THIN<T>];
  thin_product(p.w2_row(e, o0), p.a.w2_r, p.a.w2_c, n, p.F, a, M, buffer);
  const T* b2 = p.b2(e);
  for (int m = 0; m < M; ++m)
    for (int o = 0; o < n; o += LANES) {
      vf x = load(buffer + m * n + o, n - o);
      if (b2) x = x + load(b2 + o0 + o, n - o);
      p.put(out, e, m, o0 + o, x, n - o);
    }
}

}  // namespace hg
