// The backward products of grouped_ffn. For an expert's rows (lanes), with G the output's gradient and s the router's weight:
//
//     dA' = G W2,  ds = <dA', A>,  dH = s dA' act'(H),  dX = dH W1       per block of rows: input_gradients
//     dW1 = dH^T X,  dW2 = G^T (s A)                                     per cut of columns: weight_gradients
//
// dH and s A pass from the first to the second through scratch, a row per intermediate column (Kept).
#pragma once
#include "stages.h"

namespace hg {

// dH^T [W][rows] and (s A)^T [F][rows] of one expert as tiles want them: words along the rows.
template <class T>
struct Kept {
  using S = typename Form<T>::S;
  float *dh, *sa;
  int P;  // words along the rows
  static size_t floats(int M, int W, int F) { return size_t(words<T>(M)) * (W + F); }
  Kept(float* at, int M, int W) : dh(at), sa(at + size_t(words<T>(M)) * W), P(words<T>(M)) {}
  S* row(float* of, int r) const { return (S*)(of + size_t(r) * P); }
  // LANES values of row r from place m on
  HG_INLINE void put(float* of, int r, int m, vf x) const { store(row(of, r) + m, x, P * Form<T>::M::PACK - m); }
};

// How the contraction over the W stored rows of W1 is cut into words: gate then up, each padded, or one run.
template <class T>
struct Width {
  int runs, len, P;  // runs of `len` stored rows; words in all
  explicit Width(const Problem<T>& p) {
    runs = p.gated && !p.a.interleaved ? 2 : 1;
    len = p.W / runs;
    P = runs * words<T>(len);
  }
};

// dX rows for one block (null dx: not asked for), ds, and the block's part of Kept.
template <class T>
void input_gradients(const Problem<T>& p, const Block& b, const Kept<T>& kept, T* dx, float* gp, float* dp, float* pack) {
  constexpr int PACK = Form<T>::M::PACK;
  const int e = b.e, n = b.n, M = p.count(e), PO = words<T>(p.O);
  const Width<T> width(p);
  const int32_t* pair = p.pairs(e) + b.m0;
  const T* h = (const T*)p.a.h + int64_t(p.order.offsets[e]) * p.W;
  pack_rows<T>(gp, n, p.O, [&](int m) { return (const T*)p.a.grad + int64_t(pair[m] / p.K) * p.a.grad_r; });
  alignas(64) float s[MOST] = {}, ds[MOST] = {};
  for (int m = 0; m < n; ++m) s[m] = p.scale(pair[m]);
  for (int f = 0; f < p.F; f += CHUNK) {
    const int here = std::min(CHUNK, p.F - f);
    Tile tile[TILES];
    const int tiles = make_tiles<T>(tile, here, p.a.w2_r, p.a.w2_c, p.O, true, pack,
                                    [&](int i) { return p.w2_row(e, 0) + std::min(f + i, p.F - 1) * p.a.w2_c; });
    for_chunk<T>(tile, tiles, gp, n, PO,
        [&](auto& c, int lane0, int t) {
          constexpr int NV = sizeof(c[0]) / sizeof(vf);
          // h comes from memory: ask for what the next tile needs before its product is formed
          const int next_f = t + 1 < tiles ? f + (t + 1) * MR : f, next_m = b.m0 + lane0 + (t + 1 < tiles ? 0 : NV * LANES);
          for (int i = 0; i < MR && next_f + i < p.F; ++i)
            for (int l = 0; l < NV * LANES; l += 64 / int(sizeof(T))) {
              prefetch(h + int64_t(p.gate_row(next_f + i)) * M + next_m + l);
              if (p.gated) prefetch(h + int64_t(p.up_row(next_f + i)) * M + next_m + l);
            }
          for (int v = 0; v < NV; ++v) {
            const int lane = lane0 + v * LANES, m = b.m0 + lane, left = n - lane;
            const vf sv = *(const vf_u*)(s + lane);
            vf sum = *(const vf_u*)(ds + lane), dg[MR], du[MR];
            for (int i = 0; i < MR; ++i) {
              const int col = f + t * MR + i;
              dg[i] = du[i] = vf{};
              if (col >= p.F) continue;
              const vf g = load(h + int64_t(p.gate_row(col)) * M + m, left);
              const vf u = p.gated ? load(h + int64_t(p.up_row(col)) * M + m, left) : vf{};
              const vf a = p.act.backward(g, u, c[i][v] * sv, dg[i], du[i]);
              sum = sum + c[i][v] * a;
              kept.put(kept.sa, col, m, a * sv);
              kept.put(kept.dh, p.gate_row(col), m, dg[i]);
              if (p.gated) kept.put(kept.dh, p.up_row(col), m, du[i]);
            }
            *(vf_u*)(ds + lane) = sum;
            if (!dx) continue;
            float* out = dp + panel_floats(lane0 / LANES, width.P) + v * LANES;
            auto word = [&](int at, vf x, vf y) {
              *(vf_u*)(out + size_t(at) * NV * LANES) = make_words<typename Form<T>::M>(x, y);
            };
            const int first = f + t * MR;
            if (p.gated && p.a.interleaved) {
              for (int i = 0; i < MR && first + i < p.F; ++i) {
                if (PACK == 2) word(first + i, dg[i], du[i]);
                else word(2 * (first + i), dg[i], vf{}), word(2 * (first + i) + 1, du[i], vf{});
              }
            } else {
              for (int i = 0; i < MR && first + i < p.F; i += PACK) {
                const int at = (first + i) / PACK, next = PACK == 2 ? i + 1 : i;
                word(at, dg[i], dg[next]);
                if (p.gated) word(words<T>(p.F) + at, du[i], du[next]);
              }
            }
          }
        },
        [](int, int) {});
  }
  if (p.a.ds) {
    const T* b2 = p.a.b2 ? (const T*)p.a.b2 + int64_t(e) * p.O : nullptr;
    for (int m = 0; m < n; ++m) {
      const T* g = (const T*)p.a.grad + int64_t(pair[m] / p.K) * p.a.grad_r;
      vf dot{};
      for (int o = 0; b2 && o < p.O; o += LANES) dot = dot + load(g + o, p.O - o) * load(b2 + o, p.O - o);
      p.a.ds[pair[m]] = ds[m] + sum(dot);
    }
  }
  if (!dx) return;
  Turn turn;
  for (int d = 0; d < p.D; d += CHUNK) {
    const int here = std::min(CHUNK, p.D - d);
    const bool one_run = width.runs == 1 || (!p.pair_of_tensors && width.len % PACK == 0);
    Tile tile[TILES];
    int tiles = 0;
    if (one_run) {
      tiles = make_tiles<T>(tile, here, p.w1_r(0), p.w1_c(0), p.W, true, pack,
                            [&](int i) { return p.w1_row(e, 0) + std::min(d + i, p.D - 1) * p.w1_c(0); });
    } else {  // gate and up apart: pack each run, then lay the tiles over both
      const size_t each = size_t(width.P) * MR;
      Source<T> source[TILES];
      tiles = (here + MR - 1) / MR;
      for (int r = 0; r < width.runs; ++r) {
        const int f2 = r * width.len;
        for (int t = 0; t < tiles; ++t)
          for (int i = 0; i < MR; ++i)
            source[t].row[i] = p.w1_row(e, f2) + std::min(d + t * MR + i, p.D - 1) * p.w1_c(f2);
        pack_chunk(pack + size_t(r) * words<T>(width.len) * MR, source, here, p.w1_r(f2), p.w1_c(f2), width.len, each);
      }
      for (int t = 0; t < tiles; ++t) tile[t].packed = pack + t * each;
    }
    for_chunk<T>(tile, tiles, dp, n, width.P, [&](auto& c, int, int t) { turn.put(c, t); },
        [&](int lane0, int nv) {
          turn.take(nv, n - lane0, here, [&](int lane, int r, vf x) {
            store(dx + (int64_t(p.order.offsets[e]) + b.m0 + lane0 + lane) * p.D + d + r, x, here - r);
          });
        });
  }
}

// out(row, lane) = sum over an expert's rows of kept(row, m) * column(lane, m), for `rows` kept rows; out has strides
// (r, c) in elements and one of them is 1.
template <class T>
void kept_product(const float* kept, int row0, int rows, int P, const float* panels, int c0, int n, T* out,
                  int64_t r, int64_t c) {
  Turn turn;
  for (int f = 0; f < rows; f += CHUNK) {
    const int here = std::min(CHUNK, rows - f), tiles = (here + MR - 1) / MR;
    Tile tile[TILES];
    for (int t = 0; t < tiles; ++t) {
      for (int i = 0; i < MR; ++i) tile[t].row[i] = kept + size_t(row0 + std::min(f + t * MR + i, rows - 1)) * P;
      tile[t].packed = nullptr;
    }
    for_chunk<T>(tile, tiles, panels, n, P,
        [&](auto& x, int lane0, int t) {
          if (c != 1) return turn.put(x, t);
          constexpr int NV = sizeof(x[0]) / sizeof(vf);
          for (int i = 0; i < MR && t * MR + i < here; ++i)
            for (int v = 0; v < NV; ++v)
              store(out + (f + t * MR + i) * r + c0 + lane0 + v * LANES, x[i][v], n - lane0 - v * LANES);
        },
        [&](int lane0, int nv) {
          if (c != 1)
            turn.take(nv, n - lane0, here, [&](int lane, int row, vf x) {
              store(out + (c0 + lane0 + lane) * c + f + row, x, here - row);
            });
        });
  }
}

// dW1 for input columns c0 .. c0+n (or, with `down`, dW2 for outputs c0 .. c0+n) of expert e.
template <class T>
void weight_gradients(const Problem<T>& p, int e, const Kept<T>& kept, bool down, int c0, int n, float* panels) {
  const int M = p.count(e);
  const int32_t* pair = p.pairs(e);
  const T* base = (const T*)(down ? p.a.grad : p.a.rows);
  const int64_t stride = down ? p.a.grad_r : p.a.rows_r;
  pack_columns<T>(panels, c0, n, M, [&](int m) { return base + int64_t(pair[m] / p.K) * stride; });
  if (down) {
    kept_product(kept.sa, 0, p.F, kept.P, panels, c0, n, (T*)p.a.dw2 + e * p.a.dw2_e, p.a.dw2_c, p.a.dw2_r);
    return;
  }
  const int in_first = p.pair_of_tensors ? p.F : p.W;
  if (p.a.dw1)
    kept_product(kept.dh, 0, in_first, kept.P, panels, c0, n, (T*)p.a.dw1 + e * p.a.dw1_e, p.a.dw1_r, p.a.dw1_c);
  if (p.a.dwu)
    kept_product(kept.dh, p.F, p.F, kept.P, panels, c0, n, (T*)p.a.dwu + e * p.a.dwu_e, p.a.dwu_r, p.a.dwu_c);
}

// db1 = sum over rows of dH; db2 = sum over rows of s G
template <class T>
void bias_gradients(const Problem<T>& p, int e, const Kept<T>& kept) {
  const int M = p.count(e);
  if (T* db1 = (T*)p.a.db1)
    for (int f = 0; f < p.W; ++f) {
      vf x{};
      for (int m = 0; m < M; m += LANES) x = x + load(kept.row(kept.dh, f) + m, M - m);
      from_float(sum(x), db1[int64_t(e) * p.W + f]);
    }
  if (T* db2 = (T*)p.a.db2)
    for (int o = 0; o < p.O; o += LANES) {
      vf x{};
      for (int m = 0; m < M; ++m) {
        const int32_t pair = p.pairs(e)[m];
        x = x + p.scale(pair) * load((const T*)p.a.grad + int64_t(pair / p.K) * p.a.grad_r + o, p.O - o);
      }
      store(db2 + int64_t(e) * p.O + o, x, p.O - o);
    }
}

}  // namespace hg
