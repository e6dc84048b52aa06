// A register tile of C = A * B^T and the packing that feeds it.
//
// One geometry serves every type: operands are streams of 32-bit words along the contraction, a word being one float
// (Single) or two neighbouring bf16 (Pair, for the AVX512_BF16 dot product). A tile has MR rows, whose words are
// broadcast, and NV vectors of LANES columns ("lanes"), whose words lie side by side in a packed panel:
//
//     rows   in place: MR pointers to consecutive words            lanes   panel [P][NV * LANES]
//            packed:   [P][MR]
//
// fp16 is multiplied as floats: exact, and faster than as pairs of bf16 (hi + lo), which takes three products where the
// dot product instruction does two at a time.
#pragma once
#include "simd.h"

namespace hg {

#ifdef HG_AVX512
constexpr int MR = 8, NVMAX = 3;
#else
constexpr int MR = 4, NVMAX = 3;
#endif
constexpr int CHUNK = 32;  // rows of C worked on together: MR-row tiles that share a panel while it is hot

struct Single {
  static constexpr int PACK = 1;
  static HG_INLINE vf dot(vf c, vf a, vf b) { return a * b + c; }
};
#ifdef HG_BF16_DOT
struct Pair {
  static constexpr int PACK = 2;
  static HG_INLINE vf dot(vf c, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
};
#endif

// How type T is multiplied: the word form M, and the element S that intermediate results are kept in.
template <class T>
struct Form { using M = Single; using S = float; };
#ifdef HG_BF16_DOT
template <>
struct Form<bf16> { using M = Pair; using S = bf16; };
#endif
// Rows can be multiplied where they are stored.
template <class T>
constexpr bool IN_PLACE = std::is_same_v<T, typename Form<T>::S>;

template <class T>
constexpr int words(int n) { return (n + Form<T>::M::PACK - 1) / Form<T>::M::PACK; }

// ---- words out of floats -------------------------------------------------------------------------------------------

// words (a_i, b_i)
template <class M>
HG_INLINE vf make_words(vf a, vf b) {
#ifdef HG_BF16_DOT
  if constexpr (M::PACK == 2) {
    __m512i lo = _mm512_cvtepu16_epi32(bf16_of(a)), hi = _mm512_cvtepu16_epi32(bf16_of(b));
    return (vf)_mm512_or_si512(lo, _mm512_slli_epi32(hi, 16));
  }
#endif
  (void)b;
  return a;
}

// LANES words along a row from element `at`; elements at or beyond n are zero
template <class T>
HG_INLINE vf row_words(const T* row, int at, int n) {
#ifdef HG_BF16_DOT
  if constexpr (Form<T>::M::PACK == 2) return (vf)_mm512_maskz_loadu_epi16(mask32(n - at), row + at);
#endif
  return load(row + at, n - at);
}

// LANES words across columns: word i holds (r0[i], r1[i]); r1 null = zero
template <class T>
HG_INLINE vf column_words(const T* r0, const T* r1, int n) {
#ifdef HG_BF16_DOT
  if constexpr (Form<T>::M::PACK == 2) {
    __m512i lo = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask16(n), r0));
    if (!r1) return (vf)lo;
    __m512i hi = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask16(n), r1));
    return (vf)_mm512_or_si512(lo, _mm512_slli_epi32(hi, 16));
  }
#endif
  (void)r1;
  return load(r0, n);
}

// LANES x LANES words, in place
HG_INLINE void transpose(vf (&x)[LANES]) {
#ifdef HG_AVX512
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512i p = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88), q = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    __m512i r = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88), s = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    x[i] = (vf)_mm512_shuffle_i32x4(p, r, 0x88);
    x[i + 4] = (vf)_mm512_shuffle_i32x4(q, s, 0x88);
    x[i + 8] = (vf)_mm512_shuffle_i32x4(p, r, 0xdd);
    x[i + 12] = (vf)_mm512_shuffle_i32x4(q, s, 0xdd);
  }
#else
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < i; ++j) {
      float t = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = t;
    }
#endif
}

// ---- panels: how many vectors each takes, and where it lies --------------------------------------------------------

// n lanes in panels of NVMAX vectors; a rest of one vector is shared (3+1 -> 2+2), because one vector alone leaves the
// multipliers waiting for each other.
struct Panels {
  int vectors;
  explicit Panels(int n) : vectors((n + LANES - 1) / LANES) {}
  int width(int first) const {  // vectors of the panel that starts at vector `first`
    int left = vectors - first;
    return left == 4 || left == 2 ? 2 : left >= NVMAX ? NVMAX : left;
  }
};

constexpr size_t panel_floats(int vectors, int P) { return size_t(vectors) * LANES * P; }

// Lanes = rows: lane l of the panels holds row(l), its words along the row. n lanes, `len` elements each.
template <class T, class Row>
void pack_rows(float* dst, int n, int len, Row row) {
  const int P = words<T>(len);
  Panels panels(n);
  for (int v0 = 0, nv; v0 < panels.vectors; v0 += nv) {
    nv = panels.width(v0);
    float* base = dst + panel_floats(v0, P);
    for (int v = 0; v < nv; ++v) {
      const T* r[LANES];
      for (int i = 0; i < LANES; ++i) {
        int lane = (v0 + v) * LANES + i;
        r[i] = lane < n ? row(lane) : nullptr;
      }
      for (int p = 0; p < P; p += LANES) {
        vf x[LANES];
        for (int i = 0; i < LANES; ++i) x[i] = r[i] ? row_words(r[i], p * Form<T>::M::PACK, len) : vf{};
        transpose(x);
        float* out = base + size_t(p) * nv * LANES + v * LANES;
        for (int i = 0; i < LANES && p + i < P; ++i) *(vf_u*)(out + size_t(i) * nv * LANES) = x[i];
      }
    }
  }
}

// Lanes = columns c0 .. c0+n-1 of the rows row(0) .. row(len-1); the words run down the rows.
template <class T, class Row>
void pack_columns(float* dst, int c0, int n, int len, Row row) {
  constexpr int PACK = Form<T>::M::PACK;
  const int P = words<T>(len);
  Panels panels(n);
  for (int p = 0; p < P; ++p) {
    const T* r0 = row(p * PACK) + c0;
    const T* r1 = PACK == 2 && p * PACK + 1 < len ? row(p * PACK + 1) + c0 : nullptr;
    for (int v0 = 0, nv; v0 < panels.vectors; v0 += nv) {
      nv = panels.width(v0);
      float* out = dst + panel_floats(v0, P) + size_t(p) * nv * LANES;
      for (int v = 0; v < nv; ++v) {
        int c = (v0 + v) * LANES;
        *(vf_u*)(out + v * LANES) = column_words<T>(r0 + c, r1 ? r1 + c : nullptr, n - c);
      }
    }
  }
}

// ---- the row side --------------------------------------------------------------------------------------------------

// The rows of one tile: MR pointers to words in place, or one packed block.
struct Tile {
  const word* row[MR];
  const float* packed;
};

// The rows of one tile as they are stored: element (r, c) at row[r] + c * step.
template <class T>
struct Source {
  const T* row[MR];
};

// LANES words of one row whatever the distance of its elements; slow
template <class T>
vf gather_words(const T* row, size_t step, int at, int n) {
  constexpr int PACK = Form<T>::M::PACK;
  vf a{}, b{};
  for (int l = 0; l < LANES; ++l) {
    const int c = at + l * PACK;
    if (c < n) a[l] = to_float(row[c * step]);
    if (PACK == 2 && c + 1 < n) b[l] = to_float(row[(c + 1) * step]);
  }
  return make_words<typename Form<T>::M>(a, b);
}

#ifdef HG_AVX512
// MR = 8 words, one per row, where rows 0-3 (at a) and 4-7 (at b) are neighbours in memory; `next` is the distance to
// the words' second elements, where there is a `second`
template <class T>
HG_INLINE __m256 eight_words(const T* a, const T* b, size_t next, bool second) {
  if constexpr (sizeof(T) == 4) {
    return _mm256_set_m128(_mm_loadu_ps((const float*)b), _mm_loadu_ps((const float*)a));
  } else {
    auto both = [](const T* x, const T* y) {
      return _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)x), _mm_loadl_epi64((const __m128i*)y));
    };
    if constexpr (std::is_same_v<T, f16>) return _mm256_cvtph_ps(both(a, b));
    __m256i lo = _mm256_cvtepu16_epi32(both(a, b));
    if (Form<T>::M::PACK == 1) return _mm256_castsi256_ps(_mm256_slli_epi32(lo, 16));
    if (!second) return _mm256_castsi256_ps(lo);
    __m256i hi = _mm256_cvtepu16_epi32(both(a + next, b + next));
    return _mm256_castsi256_ps(_mm256_or_si256(lo, _mm256_slli_epi32(hi, 16)));
  }
}
#endif

// Packs `tiles` whole tiles whose rows are neighbours in memory (0-3 and 4-7 at least): down the contraction, all tiles
// of a chunk at once, because their elements share cache lines.
template <class T>
bool pack_neighbours(float* dst, const Source<T>* s, int tiles, size_t step, int len, size_t tile_stride) {
#ifdef HG_AVX512
  constexpr int PACK = Form<T>::M::PACK;
  const int P = words<T>(len);
#ifdef HG_BF16_DOT
  if constexpr (std::is_same_v<T, bf16>) {
    if (tiles == 4 && s[3].row[4] == s[0].row[0] + 28 && s[0].row[4] == s[0].row[0] + 4) {
      // 32 neighbours: one cache line of each of the two elements of a word
      for (int p = 0; p < P; ++p) {
        const T* at = s[0].row[0] + size_t(p) * PACK * step;
        __m512i a = _mm512_loadu_si512(at);
        __m512i b = p * PACK + 1 < len ? _mm512_loadu_si512(at + step) : _mm512_setzero_si512();
        __m512i lo = _mm512_unpacklo_epi16(a, b), hi = _mm512_unpackhi_epi16(a, b);
        float* out = dst + size_t(p) * MR;
        auto put = [&](auto t) {
          _mm_storeu_si128((__m128i*)(out + t() * tile_stride), _mm512_extracti32x4_epi32(lo, t()));
          _mm_storeu_si128((__m128i*)(out + t() * tile_stride + 4), _mm512_extracti32x4_epi32(hi, t()));
        };
        put(std::integral_constant<int, 0>()), put(std::integral_constant<int, 1>());
        put(std::integral_constant<int, 2>()), put(std::integral_constant<int, 3>());
      }
      return true;
    }
  }
#endif
  for (int p = 0; p < P; ++p) {
    const size_t at = size_t(p) * PACK * step;
    for (int t = 0; t < tiles; ++t)
      _mm256_storeu_ps(dst + t * tile_stride + size_t(p) * MR,
                       eight_words(s[t].row[0] + at, s[t].row[4] + at, step, p * PACK + 1 < len));
  }
  return true;
#else
  (void)dst, (void)s, (void)tiles, (void)step, (void)len, (void)tile_stride;
  return false;
#endif
}

// Packs `tiles` tiles of MR rows, `len` elements along the contraction, into dst[tile][P][MR], as many tiles at a
// time as fill a vector.
template <class T>
void pack_tiles(float* dst, const Source<T>* s, int tiles, size_t step, int len, size_t tile_stride) {
  constexpr int PACK = Form<T>::M::PACK, GROUP = LANES / MR;
  const int P = words<T>(len);
  for (int t0 = 0; t0 < tiles; t0 += GROUP)
    for (int p = 0; p < P; p += LANES) {
      vf x[LANES];
      for (int i = 0; i < LANES; ++i) {
        const int t = t0 + i / MR;
        if (t >= tiles) x[i] = vf{};
        else if (step == 1) x[i] = row_words(s[t].row[i % MR], p * PACK, len);
        else x[i] = gather_words(s[t].row[i % MR], step, p * PACK, len);
      }
      transpose(x);
      for (int i = 0; i < LANES && p + i < P; ++i)
        for (int g = 0; g < GROUP && t0 + g < tiles; ++g)
          std::memcpy(dst + (t0 + g) * tile_stride + size_t(p + i) * MR, (const float*)&x[i] + g * MR, MR * 4);
    }
}

// ---- the multiplication --------------------------------------------------------------------------------------------

template <class M, int NV, bool PACKED>
HG_INLINE void multiply(vf (&c)[MR][NV], const word* const (&row)[MR], const float* packed, const float* b, int P) {
  if constexpr (NV == 1) {  // two sets of sums, so that additions need not wait for each other
    vf d[MR] = {};
    int p = 0;
    for (; p + 1 < P; p += 2) {
      vf b0 = *(const vf_u*)(b + size_t(p) * LANES), b1 = *(const vf_u*)(b + size_t(p + 1) * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        c[i][0] = M::dot(c[i][0], splat(PACKED ? packed[p * MR + i] : row[i][p]), b0);
        d[i] = M::dot(d[i], splat(PACKED ? packed[(p + 1) * MR + i] : row[i][p + 1]), b1);
      }
    }
    for (; p < P; ++p)
      for (int i = 0; i < MR; ++i)
        c[i][0] = M::dot(c[i][0], splat(PACKED ? packed[p * MR + i] : row[i][p]),
                         *(const vf_u*)(b + size_t(p) * LANES));
    for (int i = 0; i < MR; ++i) c[i][0] = c[i][0] + d[i];
  } else {
    for (int p = 0; p < P; ++p, b += NV * LANES) {
      vf x[NV];
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) x[v] = *(const vf_u*)(b + v * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        vf a = splat(PACKED ? packed[p * MR + i] : row[i][p]);
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) c[i][v] = M::dot(c[i][v], a, x[v]);
      }
    }
  }
}

// c = tile times panel. A function of its own, whose sums are local: only so do all of them stay in registers.
template <class M, int NV, bool PACKED>
__attribute__((noinline)) void tile_product(vf (&c)[MR][NV], const Tile& a, const float* panel, int P) {
  vf sums[MR][NV] = {};
  const word* row[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) row[i] = PACKED ? nullptr : a.row[i];
  multiply<M, NV, PACKED>(sums, row, a.packed, panel, P);
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) c[i][v] = sums[i][v];
}

template <class T, int NV, class Epilogue>
HG_INLINE void one_panel(const Tile& a, const float* panel, int P, int lane0, Epilogue&& epilogue) {
  vf c[MR][NV];
  if (a.packed) tile_product<typename Form<T>::M, NV, true>(c, a, panel, P);
  else tile_product<typename Form<T>::M, NV, false>(c, a, panel, P);
  epilogue(c, lane0);
}

// epilogue(c, first lane) for the panel of nv vectors that starts at vector v0
template <class T, class Epilogue>
HG_INLINE void for_panel(const Tile& a, const float* panels, int v0, int nv, int P, Epilogue&& epilogue) {
  const float* panel = panels + panel_floats(v0, P);
  switch (nv) {
    case 1: return one_panel<T, 1>(a, panel, P, v0 * LANES, epilogue);
    case 2: return one_panel<T, 2>(a, panel, P, v0 * LANES, epilogue);
    default: return one_panel<T, 3>(a, panel, P, v0 * LANES, epilogue);
  }
}

}  // namespace hg
