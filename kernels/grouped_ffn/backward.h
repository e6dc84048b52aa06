// The backward products of grouped_ffn. For an expert's rows (lanes), with G the output's gradient and s the router's
// weight:
//
//     dA' = G W2,  ds = <dA', A>,  dH = s dA' act'(H),  dX = dH W1       per block of rows: hidden_, input_gradients
//     dW1 = dH^T X,  dW2 = G^T (s A)                                     per cut of columns: weight_gradients
//
// dH and s A pass from the first to the second through scratch, a row per intermediate column (Kept). Where the
// intermediate size is large, a pass takes a part of its columns (Part), and dX is summed over the parts.
#pragma once
#include "stages.h"

namespace hg {

// Intermediate columns f0 .. f0+n, and where their stored rows lie: `runs` of `len` neighbouring rows each.
template <class T>
struct Part {
  const Problem<T>& p;
  int f0, n, runs, len;
  Part(const Problem<T>& problem, int first, int count) : p(problem), f0(first), n(count) {
    runs = p.gated && !p.a.interleaved ? 2 : 1;
    len = p.gated && p.a.interleaved ? 2 * n : n;
  }
  int width() const { return runs * len; }               // stored rows in all
  int words() const { return runs * hg::words<T>(len); }  // as a contraction, each run padded
  int first_row(int run) const { return run ? p.up_row(f0) : p.gate_row(f0); }
  // local rows of gate i and up i
  int gate(int i) const { return p.gate_row(i); }
  int up(int i) const { return p.a.interleaved ? 2 * i + 1 : n + i; }
};

// dH^T [width][rows] and (s A)^T [n][rows] of one expert and part, as tiles want them: words along the rows.
template <class T>
struct Kept {
  using S = typename Form<T>::S;
  float *dh, *sa;
  int P;  // words along the rows
  static size_t floats(int M, const Part<T>& part) { return size_t(words<T>(M)) * (part.width() + part.n); }
  Kept(float* at, int M, const Part<T>& part) : dh(at), sa(at + size_t(words<T>(M)) * part.width()), P(words<T>(M)) {}
  S* row(float* of, int r) const { return (S*)(of + size_t(r) * P); }
  // LANES values of row r from place m on
  HG_INLINE void put(float* of, int r, int m, vf x) const { store(row(of, r) + m, x, P * Form<T>::M::PACK - m); }
};

// dH of one block and part: the block's lanes of Kept, dH's panels for the product with W1 (`dp`), and ds.
template <class T>
void hidden_gradients(const Part<T>& part, const Block& b, const Kept<T>& kept, float* gp, float* dp, float* pack) {
  constexpr int PACK = Form<T>::M::PACK;
  const Problem<T>& p = part.p;
  const int e = b.e, n = b.n, M = p.count(e), PO = words<T>(p.O), PH = part.words();
  const int32_t* pair = p.pairs(e) + b.m0;
  const T* h = (const T*)p.a.h + int64_t(p.order.offsets[e]) * p.W;
  pack_rows<T>(gp, n, p.O, [&](int m) { return (const T*)p.a.grad + int64_t(pair[m] / p.K) * p.a.grad_r; });
  alignas(64) float s[MOST] = {}, ds[MOST] = {};
  for (int m = 0; m < n; ++m) s[m] = p.scale(pair[m]);
  for (int f = part.f0; f < part.f0 + part.n; f += CHUNK) {
    const int here = std::min(CHUNK, part.f0 + part.n - f), last = f + here;
    Tile tile[TILES];
    const int tiles = make_tiles<T>(tile, here, p.a.w2_r, p.a.w2_c, p.O, true, pack,
                                    [&](int i) { return p.w2_row(e, 0) + std::min(f + i, p.F - 1) * p.a.w2_c; });
    for_chunk<T>(tile, tiles, gp, n, PO,
        [&](auto& c, int lane0, int t) {
          constexpr int NV = sizeof(c[0]) / sizeof(vf);
          // h comes from memory: ask for what the next tile needs before its product is formed
          const bool more = t + 1 < tiles;
          const int next_f = more ? f + (t + 1) * MR : f, next_m = b.m0 + lane0 + (more ? 0 : NV * LANES);
          for (int i = 0; i < MR && next_f + i < last; ++i)
            for (int l = 0; l < NV * LANES; l += 64 / int(sizeof(T))) {
              prefetch(h + int64_t(p.gate_row(next_f + i)) * M + next_m + l);
              if (p.gated) prefetch(h + int64_t(p.up_row(next_f + i)) * M + next_m + l);
            }
          for (int v = 0; v < NV; ++v) {
            const int lane = lane0 + v * LANES, m = b.m0 + lane, left = n - lane;
            const vf sv = *(const vf_u*)(s + lane);
            vf sum = *(const vf_u*)(ds + lane), dg[MR], du[MR];
            for (int i = 0; i < MR; ++i) {
              const int col = f + t * MR + i, at = col - part.f0;
              dg[i] = du[i] = vf{};
              if (col >= last) continue;
              const vf g = load(h + int64_t(p.gate_row(col)) * M + m, left);
              const vf u = p.gated ? load(h + int64_t(p.up_row(col)) * M + m, left) : vf{};
              const vf a = p.act.backward(g, u, c[i][v] * sv, dg[i], du[i]);
              sum = sum + c[i][v] * a;
              kept.put(kept.sa, at, m, a * sv);
              kept.put(kept.dh, part.gate(at), m, dg[i]);
              if (p.gated) kept.put(kept.dh, part.up(at), m, du[i]);
            }
            *(vf_u*)(ds + lane) = sum;
            if (!p.a.dx && !p.a.pairs) continue;
            float* out = dp + panel_floats(lane0 / LANES, PH) + v * LANES;
            auto put_word = [&](int at, vf x, vf y) {
              *(vf_u*)(out + size_t(at) * NV * LANES) = make_words<typename Form<T>::M>(x, y);
            };
            const int first = f - part.f0 + t * MR;
            if (p.gated && p.a.interleaved) {
              for (int i = 0; i < MR && first + i < part.n; ++i) {
                if (PACK == 2) put_word(first + i, dg[i], du[i]);
                else put_word(2 * (first + i), dg[i], vf{}), put_word(2 * (first + i) + 1, du[i], vf{});
              }
            } else {
              for (int i = 0; i < MR && first + i < part.n; i += PACK) {
                const int at = (first + i) / PACK, next = PACK == 2 ? i + 1 : i;
                put_word(at, dg[i], dg[next]);
                if (p.gated) put_word(words<T>(part.n) + at, du[i], du[next]);
              }
            }
          }
        },
        [](int, int) {});
  }
  if (p.a.ds) {
    const T* b2 = part.f0 == 0 ? p.b2(e) : nullptr;
    for (int m = 0; m < n; ++m) {
      const T* g = (const T*)p.a.grad + int64_t(pair[m] / p.K) * p.a.grad_r;
      vf dot{};
      for (int o = 0; b2 && o < p.O; o += LANES) dot = dot + load(g + o, p.O - o) * load(b2 + o, p.O - o);
      p.a.ds[pair[m]] = (part.f0 ? p.a.ds[pair[m]] : 0) + (ds[m] + sum(dot));
    }
  }
}

// dX of one block from dH's panels: to the block's rows of `dx` [rows, D], or to those of its pairs where they are asked
// for one by one; on top of those of the parts before.
template <class T>
void input_gradients(const Part<T>& part, const Block& b, const float* dp, float* dx, float* pack) {
  const Problem<T>& p = part.p;
  const int e = b.e, n = b.n, PH = part.words();
  const int32_t* pair = p.pairs(e) + b.m0;
  Turn turn;
  for (int d = 0; d < p.D; d += CHUNK) {
    const int here = std::min(CHUNK, p.D - d);
    // gate and up may be read as one run where all of both lies together
    const bool whole = part.runs == 2 && !p.pair_of_tensors && part.n == p.F && part.n % Form<T>::M::PACK == 0;
    Tile tile[TILES];
    int tiles = (here + MR - 1) / MR;
    if (part.runs == 1 || whole) {
      const int row = part.first_row(0);
      make_tiles<T>(tile, here, p.w1_r(row), p.w1_c(row), part.runs * part.len, true, pack,
                    [&](int i) { return p.w1_row(e, row) + std::min(d + i, p.D - 1) * p.w1_c(row); });
    } else {  // pack each run, then lay the tiles over both
      Source<T> source[TILES];
      for (int run = 0; run < part.runs; ++run) {
        const int row = part.first_row(run);
        for (int t = 0; t < tiles; ++t)
          for (int i = 0; i < MR; ++i)
            source[t].row[i] = p.w1_row(e, row) + std::min(d + t * MR + i, p.D - 1) * p.w1_c(row);
        float* to = pack + size_t(run) * words<T>(part.len) * MR;
        pack_chunk(to, source, here, p.w1_r(row), p.w1_c(row), part.len, size_t(PH) * MR);
      }
      for (int t = 0; t < tiles; ++t) tile[t].packed = pack + size_t(t) * PH * MR;
    }
    for_chunk<T>(tile, tiles, dp, n, PH, [&](auto& c, int, int t) { turn.put(c, t); },
        [&](int lane0, int nv) {
          turn.take(nv, n - lane0, here, [&](int lane, int r, vf x) {
            const int m = lane0 + lane;
            float* to = (p.a.pairs ? p.a.pairs + int64_t(pair[m]) * p.D : dx + int64_t(m) * p.D) + d + r;
            store(to, part.f0 ? load(to, here - r) + x : x, here - r);
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
      for (int i = 0; i < MR; ++i)
        tile[t].row[i] = (const word*)kept + size_t(row0 + std::min(f + t * MR + i, rows - 1)) * P;
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

// dW1 for input columns c0 .. c0+n (or, with `down`, dW2 for outputs c0 .. c0+n) of expert e, rows of this part.
template <class T>
void weight_gradients(const Part<T>& part, int e, const Kept<T>& kept, bool down, int c0, int n, float* panels) {
  const Problem<T>& p = part.p;
  const Args& a = p.a;
  const int32_t* pair = p.pairs(e);
  const T* base = (const T*)(down ? a.grad : a.rows);
  const int64_t stride = down ? a.grad_r : a.rows_r;
  pack_columns<T>(panels, c0, n, p.count(e), [&](int m) { return base + int64_t(pair[m] / p.K) * stride; });
  if (down) {
    T* to = (T*)a.dw2 + e * a.dw2_e + part.f0 * a.dw2_c;
    return kept_product(kept.sa, 0, part.n, kept.P, panels, c0, n, to, a.dw2_c, a.dw2_r);
  }
  for (int run = 0; run < part.runs; ++run) {
    const int row = part.first_row(run);
    const bool apart = p.pair_of_tensors && run;
    T* to = (T*)(apart ? a.dwu : a.dw1);
    if (!to) continue;
    to += apart ? e * a.dwu_e + (row - p.F) * a.dwu_r : e * a.dw1_e + row * a.dw1_r;
    kept_product(kept.dh, run * part.len, part.len, kept.P, panels, c0, n, to, apart ? a.dwu_r : a.dw1_r,
                 apart ? a.dwu_c : a.dw1_c);
  }
}

// db1 = sum over rows of dH; db2 = sum over rows of s G (with the first part)
template <class T>
void bias_gradients(const Part<T>& part, int e, const Kept<T>& kept) {
  const Problem<T>& p = part.p;
  const int M = p.count(e);
  if (T* db1 = (T*)p.a.db1)
    for (int r = 0; r < part.width(); ++r) {
      vf x{};
      for (int m = 0; m < M; m += LANES) x = x + load(kept.row(kept.dh, r) + m, M - m);
      from_float(sum(x), db1[int64_t(e) * p.W + part.first_row(r / part.len) + r % part.len]);
    }
  T* db2 = part.f0 == 0 ? (T*)p.a.db2 : nullptr;
  for (int o = 0; db2 && o < p.O; o += LANES) {
    vf x{};
    for (int m = 0; m < M; ++m) {
      const int32_t pair = p.pairs(e)[m];
      x = x + p.scale(pair) * load((const T*)p.a.grad + int64_t(pair / p.K) * p.a.grad_r + o, p.O - o);
    }
    store(db2 + int64_t(e) * p.O + o, x, p.O - o);
  }
}

// An fp32 value in two halves: the upper one where a 16-bit result will stand, the lower one in scratch.
#ifdef HG_AVX512
HG_INLINE vf load_halves(const uint16_t* upper, const uint16_t* lower, int n) {
  __m512i u = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask16(n), upper));
  __m512i l = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask16(n), lower));
  return (vf)_mm512_or_si512(_mm512_slli_epi32(u, 16), l);
}
HG_INLINE void store_halves(uint16_t* upper, uint16_t* lower, vf x, int n) {
  _mm256_mask_storeu_epi16(upper, mask16(n), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)x, 16)));
  _mm256_mask_storeu_epi16(lower, mask16(n), _mm512_cvtepi32_epi16((__m512i)x));
}
#else
HG_INLINE vf load_halves(const uint16_t* upper, const uint16_t* lower, int n) {
  vi x{};
  for (int i = 0; i < LANES && i < n; ++i) x[i] = int32_t(uint32_t(upper[i]) << 16 | lower[i]);
  return as_float(x);
}
HG_INLINE void store_halves(uint16_t* upper, uint16_t* lower, vf x, int n) {
  const vi bits = as_int(x);
  for (int i = 0; i < LANES && i < n; ++i) upper[i] = uint16_t(uint32_t(bits[i]) >> 16), lower[i] = uint16_t(bits[i]);
}
#endif

// dX of the tokens, summed over the passes in fp32 and in the order of experts, whatever the passes are. The sums stand
// in the result's own memory, and for 16-bit results their lower halves in as much again.
template <class T>
class InputSum {
  static constexpr bool HALVES = sizeof(T) == 2;
  const Problem<T>& p;
  Scratch<uint16_t> lower;         // [R, D]
  std::vector<int32_t> place, at;  // a token's places in the order of experts, and the first not yet added

  vf get(int64_t i, int n) const {
    if constexpr (HALVES) return load_halves((const uint16_t*)p.a.dx + i, lower.get() + i, n);
    else return load((const T*)p.a.dx + i, n);
  }
  void put(int64_t i, vf x, int n) {
    if constexpr (HALVES) store_halves((uint16_t*)p.a.dx + i, lower.get() + i, x, n);
    else store((T*)p.a.dx + i, x, n);
  }

 public:
  explicit InputSum(const Problem<T>& problem) : p(problem), lower(p.a.dx && HALVES ? size_t(p.a.R) * p.D : 0) {
    if (!p.a.dx) return;
    place = p.order.row_of_pair;
    at.resize(p.a.R);
  }
  void begin(int64_t t) {
    std::sort(place.begin() + t * p.K, place.begin() + (t + 1) * p.K);
    for (int d = 0; d < p.D; d += LANES) put(t * p.D + d, vf{}, p.D - d);
  }
  // adds the rows of places lo .. hi, which start at `rows`
  void add(int64_t t, const float* rows, int lo, int hi) {
    int& i = at[t];
    for (; i < p.K && place[t * p.K + i] < hi; ++i) {
      const float* row = rows + int64_t(place[t * p.K + i] - lo) * p.D;
      for (int d = 0; d < p.D; d += LANES)
        put(t * p.D + d, get(t * p.D + d, p.D - d) + load(row + d, p.D - d), p.D - d);
    }
  }
  void end(int64_t t) {
    for (int d = 0; HALVES && d < p.D; d += LANES) store((T*)p.a.dx + t * p.D + d, get(t * p.D + d, p.D - d), p.D - d);
  }
};

}  // namespace hg
