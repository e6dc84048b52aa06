// The products of grouped_ffn, each for one expert and a run of its rows. Rows of tokens are always the lanes; rows of
// weights are broadcast, in place where they lie right. A result with tokens in its lanes is the next product's panel.
#pragma once
#include "problem.h"

namespace hg {

constexpr int TILES = CHUNK / MR;

inline size_t tiles_floats(int P) { return size_t(CHUNK) * P; }

// Packs a chunk's tiles; `r` is the distance of neighbouring rows, `step` that of neighbours along the contraction.
template <class T>
void pack_chunk(float* pack, const Source<T>* source, int rows, int64_t step, int64_t r, int len, size_t tile_stride) {
  const int tiles = (rows + MR - 1) / MR;
  int done = r == 1 ? rows / MR : 0;  // tiles whose rows are all there may be read several rows at a time
  if (done && !pack_neighbours(pack, source, done, step, len, tile_stride)) done = 0;
  if (done < tiles) pack_tiles(pack + done * tile_stride, source + done, tiles - done, step, len, tile_stride);
}

// The rows r0 .. of a chunk as tiles: in place when the words along a row lie side by side, packed into `pack` if not.
// row(i) is the address of the chunk's i-th row (any valid row for i beyond the last), `step` the distance of
// neighbours along the contraction, `r` that of neighbouring rows.
template <class T, class Row>
int make_tiles(Tile (&tile)[TILES], int rows, int64_t step, int64_t r, int len, bool can_be_in_place, float* pack,
               Row row) {
  const int tiles = (rows + MR - 1) / MR, P = words<T>(len);
  Source<T> source[TILES];
  for (int t = 0; t < tiles; ++t)
    for (int i = 0; i < MR; ++i) source[t].row[i] = row(t * MR + i);
  if (IN_PLACE<T> && can_be_in_place && step == 1 && len % Form<T>::M::PACK == 0) {
    for (int t = 0; t < tiles; ++t) {
      for (int i = 0; i < MR; ++i) tile[t].row[i] = (const word*)source[t].row[i];
      tile[t].packed = nullptr;
    }
    return tiles;
  }
  pack_chunk(pack, source, rows, step, r, len, size_t(P) * MR);
  for (int t = 0; t < tiles; ++t) tile[t].packed = pack + size_t(t) * P * MR;
  return tiles;
}

// for every panel, every tile of the chunk: epilogue(c, lane0, t); then done(lane0, nv)
template <class T, class Epilogue, class Done>
HG_INLINE void for_chunk(const Tile* tile, int tiles, const float* panels, int n, int P, Epilogue&& epilogue,
                         Done&& done) {
  Panels p(n);
  for (int v0 = 0, nv; v0 < p.vectors; v0 += nv) {
    nv = p.width(v0);
    for (int t = 0; t < tiles; ++t)
      for_panel<T>(tile[t], panels, v0, nv, P, [&](auto& c, int lane0) { epilogue(c, lane0, t); });
    done(v0 * LANES, nv);
  }
}

// One panel's results of a chunk, [CHUNK rows][nv * LANES lanes], read back lane by lane with the rows side by side.
struct Turn {
  float buffer[CHUNK * NVMAX * LANES];

  template <int NV>
  HG_INLINE void put(vf (&c)[MR][NV], int t) {
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < NV; ++v) *(vf_u*)(buffer + ((t * MR + i) * NV + v) * LANES) = c[i][v];
  }
  // write(lane, row, x): LANES results of lane `lane` from row `row` on
  template <class Write>
  HG_INLINE void take(int nv, int lanes, int rows, Write&& write) {
    for (int v = 0; v < nv; ++v)
      for (int r = 0; r < rows; r += LANES) {
        vf x[LANES];
        for (int i = 0; i < LANES; ++i) x[i] = *(const vf_u*)(buffer + ((r + i) * nv + v) * LANES);
        transpose(x);
        for (int i = 0; i < LANES && v * LANES + i < lanes; ++i) write(v * LANES + i, r, x[i]);
      }
  }
};

// Where a tile row's expert row lies, and its stored rows: gated tiles hold MR/2 gates and their ups.
template <class T>
struct UpTile {
  const Problem<T>& p;
  const int per;  // intermediate columns a tile covers
  explicit UpTile(const Problem<T>& problem) : p(problem), per(problem.gated ? MR / 2 : MR) {}
  int gate_at(int i) const { return p.gated && p.a.interleaved ? 2 * i : i; }
  int up_at(int i) const { return p.a.interleaved ? 2 * i + 1 : MR / 2 + i; }
  int stored_row(int f, int i) const {
    auto within = [&](int x) { return std::min(x, p.F - 1); };
    if (!p.gated) return within(f + i);
    if (p.a.interleaved) return i % 2 ? p.up_row(within(f + i / 2)) : p.gate_row(within(f + i / 2));
    return i < MR / 2 ? p.gate_row(within(f + i)) : p.up_row(within(f + i - MR / 2));
  }
};

// A = act(X W1^T + b1) for columns f0 .. f1 of expert e: X panels over D in `xp`, A panels over F in `ap`;
// the pre-activation goes to h (null: not kept), stored [W][rows of the expert].
template <class T>
void up_product(const Problem<T>& p, int e, int m0, int n, int f0, int f1, const float* xp, float* ap, T* h,
                float* pack) {
  constexpr int PACK = Form<T>::M::PACK;
  const int P = words<T>(p.D), PA = words<T>(p.F), M = p.count(e);
  const UpTile<T> up(p);
  const T* b1 = p.b1(e);
  for (int f = f0; f < f1; f += TILES * up.per) {
    const int here = std::min(TILES * up.per, f1 - f), tiles_here = (here + up.per - 1) / up.per;
    Tile tile[TILES];
    const bool whole = here % up.per == 0;
    const bool same = p.w1_r(0) == p.w1_r(p.W - 1) && p.w1_c(0) == p.w1_c(p.W - 1);
    make_tiles<T>(tile, tiles_here * MR, p.w1_c(0), whole && same ? p.w1_r(0) : 0, p.D, same, pack,
                  [&](int i) { return p.w1_row(e, up.stored_row(f + i / MR * up.per, i % MR)); });
    for_chunk<T>(tile, tiles_here, xp, n, P,
        [&](auto& c, int lane0, int t) {
          constexpr int NV = sizeof(c[0]) / sizeof(vf);
          for (int v = 0; v < NV; ++v) {
            const int lane = lane0 + v * LANES, left = n - lane;
            vf act[MR];
            for (int i = 0; i < up.per; ++i) {
              const int col = f + t * up.per + i;
              act[i] = vf{};
              if (col >= p.F) continue;
              const int gr = p.gate_row(col), ur = p.up_row(col);
              vf g = c[up.gate_at(i)][v], u{};
              if (b1) g = g + to_float(b1[gr]);
              if (h) store(h + int64_t(gr) * M + m0 + lane, g, left);
              if (p.gated) {
                u = c[up.up_at(i)][v];
                if (b1) u = u + to_float(b1[ur]);
                if (h) store(h + int64_t(ur) * M + m0 + lane, u, left);
              }
              act[i] = p.act.forward(g, u);
            }
            for (int i = 0; i < up.per; i += PACK) {
              const int word = (f + t * up.per + i) / PACK;
              if (word >= PA) break;
              float* out = ap + panel_floats(lane0 / LANES, PA) + size_t(word) * NV * LANES + v * LANES;
              *(vf_u*)out = make_words<typename Form<T>::M>(act[i], PACK == 2 ? act[i + 1] : vf{});
            }
          }
        },
        [](int, int) {});
  }
}

// A W2^T + b2 for outputs o0 .. o1, rows m0 .. m0+n of expert e, to where Problem::put has it; out is [live rows, O].
template <class T>
void down_product(const Problem<T>& p, int e, int m0, int n, int o0, int o1, const float* ap, T* out, float* pack) {
  const int P = words<T>(p.F);
  const T* b2 = p.b2(e);
  Turn turn;
  for (int o = o0; o < o1; o += CHUNK) {
    const int here = std::min(CHUNK, o1 - o);
    Tile tile[TILES];
    const int tiles = make_tiles<T>(tile, here, p.a.w2_c, p.a.w2_r, p.F, true, pack,
                                    [&](int i) { return p.w2_row(e, std::min(o + i, p.O - 1)); });
    for_chunk<T>(tile, tiles, ap, n, P, [&](auto& c, int, int t) { turn.put(c, t); },
        [&](int lane0, int nv) {
          turn.take(nv, n - lane0, here, [&](int lane, int r, vf x) {
            const int left = here - r;
            if (b2) x = x + load(b2 + o + r, left);
            p.put(out, e, m0 + lane0 + lane, o + r, x, left);
          });
        });
  }
}

// y[t] = sum over k of the live rows of (t, k), in fp32, in the order of k
template <class T>
void sum_rows(const Problem<T>& p, const T* rows, int width, T* y, int64_t t0, int64_t t1) {
  for (int64_t t = t0; t < t1; ++t) {
    const int32_t* at = p.order.row_of_pair.data() + t * p.K;
    for (int d = 0; d < width; d += LANES) {
      vf s{};
      for (int k = 0; k < p.K; ++k)
        if (at[k] < p.live()) s = s + load(rows + int64_t(at[k]) * width + d, width - d);
      store(y + t * width + d, s, width - d);
    }
  }
}

}  // namespace hg
