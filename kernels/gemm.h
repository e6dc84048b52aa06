// A register tile of C = A * B^T and the packing that feeds it.
//
// One geometry serves every type: operands are streams of 32-bit words along the contraction, a word being one float
// (Single) or two neighbouring bf16 (Pair, for the AVX512_BF16 dot product). A tile has MR rows, whose words are
// broadcast, and NV vectors of LANES columns ("lanes"), whose words lie side by side in a packed panel:
//
//     rows   in place: MR pointers to consecutive words            lanes   panel [part][P][NV * LANES]
//            packed:   [part][P][MR]
//
// fp16 has 11 significant bits, bf16 has 8: an fp16 value is the sum of two bf16 (hi + lo), so an fp16 product is three
// bf16 products (hi hi + hi lo + lo hi), exact to 2^-18. Those are the `parts`.
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

// How type T is multiplied: the word form M, how many parts a value is split into, and the element kept in scratch.
template <class T>
struct Form;
template <>
struct Form<float> { using M = Single; using S = float; static constexpr int PARTS = 1; static constexpr bool IN_PLACE = true; };
#ifdef HG_BF16_DOT
template <>
struct Form<bf16> { using M = Pair; using S = bf16; static constexpr int PARTS = 1; static constexpr bool IN_PLACE = true; };
template <>
struct Form<f16> { using M = Pair; using S = bf16; static constexpr int PARTS = 2; static constexpr bool IN_PLACE = false; };
#else
template <>
struct Form<bf16> { using M = Single; using S = float; static constexpr int PARTS = 1; static constexpr bool IN_PLACE = false; };
template <>
struct Form<f16> { using M = Single; using S = float; static constexpr int PARTS = 1; static constexpr bool IN_PLACE = false; };
#endif

template <class T>
constexpr int words(int n) { return (n + Form<T>::M::PACK - 1) / Form<T>::M::PACK; }

// ---- words out of floats -------------------------------------------------------------------------------------------

#ifdef HG_BF16_DOT
// What is left of x after rounding to bf16 (part 1), or x itself (part 0); an infinity leaves nothing.
HG_INLINE vf part_of(vf x, int part) {
  if (part == 0) return x;
  vf hi = float_of_bf16(bf16_of(x));
  __mmask16 finite = _mm512_cmp_ps_mask((__m512)(hi - hi), _mm512_setzero_ps(), _CMP_EQ_OQ);
  return (vf)_mm512_maskz_sub_ps(finite, (__m512)x, (__m512)hi);
}
// words (a_i, b_i) of one part
HG_INLINE vf pair_words(vf a, vf b, int part) {
  __m512i lo = _mm512_cvtepu16_epi32(bf16_of(part_of(a, part))), hi = _mm512_cvtepu16_epi32(bf16_of(part_of(b, part)));
  return (vf)_mm512_or_si512(lo, _mm512_slli_epi32(hi, 16));
}
#endif
template <class M>
HG_INLINE vf make_words(vf a, vf b, int part) {
#ifdef HG_BF16_DOT
  if constexpr (M::PACK == 2) return pair_words(a, b, part);
#endif
  (void)b, (void)part;
  return a;
}

// LANES words along a row from element `at`; elements at or beyond n are zero
template <class T>
HG_INLINE vf row_words(const T* row, int at, int n, int part) {
  if constexpr (Form<T>::M::PACK == 1) {
    return load(row + at, n - at);
  } else {
#ifdef HG_BF16_DOT
    if constexpr (sizeof(T) == 2 && Form<T>::PARTS == 1) {
      return (vf)_mm512_maskz_loadu_epi16(mask32(n - at), row + at);
    } else {
      vf a = part_of(load(row + at, n - at), part), b = part_of(load(row + at + 16, n - at - 16), part);
      return (vf)_mm512_inserti64x4(_mm512_castsi256_si512(bf16_of(a)), bf16_of(b), 1);
    }
#endif
  }
}

// LANES words across columns: word i holds (r0[i], r1[i]); r1 null = zero
template <class T>
HG_INLINE vf column_words(const T* r0, const T* r1, int n, int part) {
  if constexpr (Form<T>::M::PACK == 1) {
    return load(r0, n);
  } else {
#ifdef HG_BF16_DOT
    if constexpr (Form<T>::PARTS == 1) {
      __m512i lo = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask16(n), r0));
      if (!r1) return (vf)lo;
      __m512i hi = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask16(n), r1));
      return (vf)_mm512_or_si512(lo, _mm512_slli_epi32(hi, 16));
    } else {
      return pair_words(load(r0, n), r1 ? load(r1, n) : vf{}, part);
    }
#endif
  }
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

template <class T>
constexpr size_t panel_floats(int vectors, int P) { return size_t(vectors) * LANES * P * Form<T>::PARTS; }

// Lanes = rows: lane l of the panels holds row(l), its words along the row. n lanes, `len` elements each.
template <class T, class Row>
void pack_rows(float* dst, int n, int len, Row row) {
  constexpr int PACK = Form<T>::M::PACK, PARTS = Form<T>::PARTS;
  const int P = words<T>(len);
  Panels panels(n);
  for (int v0 = 0, nv; v0 < panels.vectors; v0 += nv) {
    nv = panels.width(v0);
    float* base = dst + panel_floats<T>(v0, P);
    for (int v = 0; v < nv; ++v) {
      const T* r[LANES];
      for (int i = 0; i < LANES; ++i) {
        int lane = (v0 + v) * LANES + i;
        r[i] = lane < n ? row(lane) : nullptr;
      }
      for (int part = 0; part < PARTS; ++part)
        for (int p = 0; p < P; p += LANES) {
          vf x[LANES];
          for (int i = 0; i < LANES; ++i) x[i] = r[i] ? row_words(r[i], p * PACK, len, part) : vf{};
          transpose(x);
          int m = P - p < LANES ? P - p : LANES;
          float* out = base + (size_t(part) * P + p) * nv * LANES + v * LANES;
          for (int i = 0; i < m; ++i) *(vf_u*)(out + size_t(i) * nv * LANES) = x[i];
        }
    }
  }
}

// Lanes = columns c0 .. c0+n-1 of the rows row(0) .. row(len-1); the words run down the rows.
template <class T, class Row>
void pack_columns(float* dst, int c0, int n, int len, Row row) {
  constexpr int PACK = Form<T>::M::PACK, PARTS = Form<T>::PARTS;
  const int P = words<T>(len);
  Panels panels(n);
  for (int part = 0; part < PARTS; ++part)
    for (int p = 0; p < P; ++p) {
      const T* r0 = row(p * PACK) + c0;
      const T* r1 = PACK == 2 && p * PACK + 1 < len ? row(p * PACK + 1) + c0 : nullptr;
      for (int v0 = 0, nv; v0 < panels.vectors; v0 += nv) {
        nv = panels.width(v0);
        float* out = dst + panel_floats<T>(v0, P) + (size_t(part) * P + p) * nv * LANES;
        for (int v = 0; v < nv; ++v) {
          int c = (v0 + v) * LANES;
          *(vf_u*)(out + v * LANES) = column_words<T>(r0 + c, r1 ? r1 + c : nullptr, n - c, part);
        }
      }
    }
}

// ---- the row side --------------------------------------------------------------------------------------------------

// The rows of one tile: MR pointers to words in place, or one packed block.
struct Tile {
  const float* row[MR];
  const float* packed;
  size_t part_stride;  // words from one part to the next
};

// Rows of a matrix of T seen with strides (in elements): element (r, c) at row(r) + c * step.
template <class T>
struct Source {
  const T* row[MR];
};

template <class T>
HG_INLINE vf gather_row_words(const Source<T>& s, size_t step, int p, int len, int part, int i) {
  constexpr int PACK = Form<T>::M::PACK;
  vf a{}, b{};
  for (int l = 0; l < LANES; ++l) {
    int c = (p + l) * PACK;
    if (c < len) a[l] = to_float(s.row[i][c * step]);
    if (PACK == 2 && c + 1 < len) b[l] = to_float(s.row[i][(c + 1) * step]);
  }
  return make_words<typename Form<T>::M>(a, b, part);
}

#ifdef HG_AVX512
// MR = 8 elements, one per row, where rows 0-3 and 4-7 are neighbours in memory
template <class T>
HG_INLINE __m256 eight(const T* a, const T* b) {
  if constexpr (sizeof(T) == 4) {
    return _mm256_set_m128(_mm_loadu_ps((const float*)b), _mm_loadu_ps((const float*)a));
  } else {
    __m128i x = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)a), _mm_loadl_epi64((const __m128i*)b));
    if constexpr (std::is_same_v<T, bf16>) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
    else return _mm256_cvtph_ps(x);
  }
}
template <class T>
HG_INLINE __m256 eight_words(const Source<T>& s, size_t at, size_t step, bool second, int part) {
  const T *a = s.row[0] + at, *b = s.row[4] + at;
#ifdef HG_BF16_DOT
  if constexpr (std::is_same_v<T, bf16>) {
    __m128i x = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)a), _mm_loadl_epi64((const __m128i*)b));
    __m256i lo = _mm256_cvtepu16_epi32(x);
    if (!second) return _mm256_castsi256_ps(lo);
    x = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)(a + step)), _mm_loadl_epi64((const __m128i*)(b + step)));
    return _mm256_castsi256_ps(_mm256_or_si256(lo, _mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)));
  } else if constexpr (std::is_same_v<T, f16>) {
    vf u = (vf)_mm512_castps256_ps512(eight(a, b));
    vf w = second ? (vf)_mm512_castps256_ps512(eight(a + step, b + step)) : vf{};
    return _mm512_castps512_ps256((__m512)pair_words(u, w, part));
  }
#endif
  (void)step, (void)second, (void)part;
  return eight(a, b);
}
#endif

// Packs `tiles` tiles of MR rows, `len` elements along the contraction, into dst[tile][part][P][MR].
// `side_by_side`: rows 0-3 and 4-7 of every tile are neighbours in memory (only then may they be read four at a time).
template <class T>
void pack_tiles(float* dst, const Source<T>* s, int tiles, size_t step, int len, bool side_by_side, size_t tile_stride,
                size_t part_stride) {
  constexpr int PACK = Form<T>::M::PACK, PARTS = Form<T>::PARTS;
  const int P = words<T>(len);
#ifdef HG_AVX512
#ifdef HG_BF16_DOT
  if constexpr (std::is_same_v<T, bf16>) {
    if (side_by_side && tiles == 4 && s[3].row[4] == s[0].row[0] + 28 && s[0].row[4] == s[0].row[0] + 4) {
      // 32 neighbours: one cache line of each of the two elements of a word
      for (int p = 0; p < P; ++p) {
        const T* at = s[0].row[0] + size_t(p) * PACK * step;
        __m512i a = _mm512_loadu_si512(at), b = p * PACK + 1 < len ? _mm512_loadu_si512(at + step) : _mm512_setzero_si512();
        __m512i lo = _mm512_unpacklo_epi16(a, b), hi = _mm512_unpackhi_epi16(a, b);
        float* out = dst + size_t(p) * MR;
        auto put = [&](auto t) {
          _mm_storeu_si128((__m128i*)(out + t() * tile_stride), _mm512_extracti32x4_epi32(lo, t()));
          _mm_storeu_si128((__m128i*)(out + t() * tile_stride + 4), _mm512_extracti32x4_epi32(hi, t()));
        };
        put(std::integral_constant<int, 0>()), put(std::integral_constant<int, 1>());
        put(std::integral_constant<int, 2>()), put(std::integral_constant<int, 3>());
      }
      return;
    }
  }
#endif
  if (side_by_side) {  // down the contraction, all tiles of a chunk at once: their elements share cache lines
    for (int part = 0; part < PARTS; ++part)
      for (int p = 0; p < P; ++p)
        for (int t = 0; t < tiles; ++t)
          _mm256_storeu_ps(dst + t * tile_stride + part * part_stride + size_t(p) * MR,
                           eight_words(s[t], size_t(p) * PACK * step, step, p * PACK + 1 < len, part));
    return;
  }
#endif
  for (int t = 0; t < tiles; ++t)
    for (int part = 0; part < PARTS; ++part)
      for (int p = 0; p < P; p += LANES) {
        vf x[LANES];
        for (int i = 0; i < LANES; ++i) {
          if (i >= MR) x[i] = vf{};
          else if (step == 1) x[i] = row_words(s[t].row[i], p * PACK, len, part);
          else x[i] = gather_row_words(s[t], step, p, len, part, i);
        }
        transpose(x);
        float* out = dst + t * tile_stride + part * part_stride + size_t(p) * MR;
        for (int i = 0; i < LANES && p + i < P; ++i) std::memcpy(out + i * MR, &x[i], MR * 4);
      }
}

// ---- the multiplication --------------------------------------------------------------------------------------------

template <class M, int NV, bool PACKED>
HG_INLINE void multiply(vf (&c)[MR][NV], const float* const (&row)[MR], const float* packed, const float* b, int P) {
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
        c[i][0] = M::dot(c[i][0], splat(PACKED ? packed[p * MR + i] : row[i][p]), *(const vf_u*)(b + size_t(p) * LANES));
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
template <class T, int NV, bool PACKED>
__attribute__((noinline)) void tile_product(vf (&c)[MR][NV], const Tile& a, const float* panel, int P) {
  constexpr int segments = Form<T>::PARTS == 2 ? 3 : 1;
  vf sums[MR][NV] = {};
  for (int s = 0; s < segments; ++s) {
    const size_t of_a = s == 2 ? a.part_stride : 0;
    const float* row[MR];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) row[i] = PACKED ? nullptr : a.row[i] + of_a;
    multiply<typename Form<T>::M, NV, PACKED>(sums, row, PACKED ? a.packed + of_a : nullptr,
                                              panel + (s == 1 ? size_t(P) * NV * LANES : 0), P);
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) c[i][v] = sums[i][v];
}

template <class T, int NV, class Epilogue>
HG_INLINE void one_panel(const Tile& a, const float* panel, int P, int lane0, Epilogue&& epilogue) {
  vf c[MR][NV];
  if (a.packed) tile_product<T, NV, true>(c, a, panel, P);
  else tile_product<T, NV, false>(c, a, panel, P);
  epilogue(c, lane0);
}

// epilogue(c, first lane) for the panel of nv vectors that starts at vector v0
template <class T, class Epilogue>
HG_INLINE void for_panel(const Tile& a, const float* panels, int v0, int nv, int P, Epilogue&& epilogue) {
  const float* panel = panels + panel_floats<T>(v0, P);
  switch (nv) {
    case 1: return one_panel<T, 1>(a, panel, P, v0 * LANES, epilogue);
    case 2: return one_panel<T, 2>(a, panel, P, v0 * LANES, epilogue);
    default: return one_panel<T, 3>(a, panel, P, v0 * LANES, epilogue);
  }
}

}  // namespace hg
