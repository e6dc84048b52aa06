// Weights of few bits (quantized.py says what they mean): from stored bytes to vectors of floats, and to widened rows.
//
// A row is read in units of 32 columns, which are a part of every group that has one scale. The numbers of a unit come
// in the order that costs nothing: as they lie for bytes; for nibbles the even columns of every 2 * LANES, then the odd
// ones.
#pragma once
#include <algorithm>

#include "simd.h"

namespace hg {

enum Format { INT8, INT4, MXFP4, UINT4, Q8_0, Q4_0, GGUF_MXFP4, Q4_K, Q5_K, Q6_K };
constexpr int UNIT = 32, VECTORS = UNIT / LANES;

// From Q8_0 on the formats are GGUF's blocks (quantized_blocks.h), which hold their own scales.
constexpr bool in_blocks(int64_t format) { return format >= Q8_0; }
constexpr bool in_super(int64_t format) { return format >= Q4_K; }
constexpr int block_weights(int64_t format) { return in_super(format) ? 256 : 32; }
constexpr int block_bytes(int64_t format) {
  constexpr int BYTES[] = {34, 18, 17, 144, 176, 210};
  return BYTES[format - Q8_0];
}

// Weights [E, O, I] as Python hands them over; see _matrix in grouped_ffn/quantized_on_cpu.py.
struct FewBits {
  const uint8_t* data;
  int64_t e, r;  // bytes from expert to expert, from row to row
  const void* scale;
  int64_t se, sr;      // the same for scales, in elements
  int64_t format;      // of enum Format
  int64_t group;       // columns that share a scale
  int64_t scale_type;  // 0, 1, 2: fp32, bf16, fp16; 3: e8m0

  int groups(int columns) const { return int((columns + group - 1) / group); }
  bool nibbles() const { return format == INT4 || format == MXFP4 || format == UINT4; }
  int shift() const { return group == 32 ? 0 : group == 64 ? 1 : 2; }  // from a unit to its group
  int64_t bytes(int columns) const {
    if (in_blocks(format)) return columns / block_weights(format) * block_bytes(format);
    return nibbles() ? columns / 2 : columns;
  }
  const uint8_t* row(int64_t slot, int o) const { return data + slot * e + o * r; }
};

// The memory is asked for in the order in which it lies, this many bytes early, as in grouped_ffn/thin.h.
constexpr int BYTES_AHEAD = 4096;

constexpr int padded(int columns) { return (columns + UNIT - 1) / UNIT * UNIT; }

// The scales of a row of `columns`, and for UINT4 the zeros after them, as floats: in place where they are, in `buffer`
// where not, which has room for `scale_floats`.
constexpr int scale_floats(int columns) { return 2 * padded(columns) / UNIT; }

inline const float* scales_of(const FewBits& w, int64_t slot, int o, int columns, float* __restrict buffer) {
  const int64_t at = slot * w.se + o * w.sr;
  const int n = w.groups(columns) * (w.format == UINT4 ? 2 : 1);
  if (w.scale_type == 0) return (const float*)w.scale + at;
  if (w.scale_type == 1) {
    for (int i = 0; i < n; ++i) buffer[i] = to_float(((const bf16*)w.scale)[at + i]);
  } else if (w.scale_type == 2) {
    for (int i = 0; i < n; ++i) buffer[i] = to_float(((const f16*)w.scale)[at + i]);
  } else {
    const uint8_t* __restrict exponents = (const uint8_t*)w.scale + at;
    for (int i = 0; i < n; ++i) {
      const uint32_t s = exponents[i], power = s == 0 ? 0x00400000u : s << 23;
      const uint32_t bits = s == 255 ? 0x7fc00000u : power;
      std::memcpy(buffer + i, &bits, 4);
    }
  }
  return buffer;
}

// Where among a row's scales its zeros begin; for formats without, any place.
template <Format FORMAT>
constexpr int zeros_at(int columns, int shift) {
  return FORMAT == UINT4 ? (padded(columns) / UNIT + (1 << shift) - 1) >> shift : 0;
}

// LANES bytes as integers, with their sign or without.
template <bool SIGNED>
HG_INLINE vi wide_ints(const uint8_t* p) {
#if defined(HG_AVX512)
  const __m128i x = _mm_loadu_si128((const __m128i*)p);
  return (vi)(SIGNED ? _mm512_cvtepi8_epi32(x) : _mm512_cvtepu8_epi32(x));
#elif defined(__AVX2__)
  const __m128i x = _mm_loadl_epi64((const __m128i*)p);
  return (vi)(SIGNED ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
#else
  vi x;
  for (int i = 0; i < LANES; ++i) x[i] = SIGNED ? int32_t(int8_t(p[i])) : int32_t(p[i]);
  return x;
#endif
}

template <Format FORMAT>
HG_INLINE vf nibble(vi n) {  // of 0 .. 15
  if constexpr (FORMAT == INT4) return __builtin_convertvector(n - 8, vf);
  if constexpr (FORMAT == UINT4) return __builtin_convertvector(n, vf);
#ifdef HG_AVX512
  const vf table = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  return __builtin_shuffle(table, n);
#else
  const vf table = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};  // by the last three bits; the fourth is the sign
  return as_float(as_int(__builtin_shuffle(table, n)) ^ ((n & 8) << 28));
#endif
}

// The numbers of a unit, before their scale; `zero` is UINT4's.
template <Format FORMAT>
HG_INLINE void numbers(const uint8_t* p, float zero, vf (&w)[VECTORS]) {
  if constexpr (FORMAT == INT8) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) w[v] = __builtin_convertvector(wide_ints<true>(p + v * LANES), vf);
  } else {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v += 2) {
      const vi both = wide_ints<false>(p + v / 2 * LANES);
      w[v] = nibble<FORMAT>(both & 15);
      w[v + 1] = nibble<FORMAT>(both >> 4);
      if constexpr (FORMAT == UINT4) w[v] -= splat(zero), w[v + 1] -= splat(zero);
    }
  }
}

template <Format FORMAT>
constexpr int UNIT_BYTES = FORMAT == INT8 ? UNIT : UNIT / 2;

// ---- rows widened ---------------------------------------------------------------------------------------------------

#ifdef HG_AVX512
constexpr vi FIRST_HALF = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#else
constexpr vi FIRST_HALF = {0, 8, 1, 9, 2, 10, 3, 11};
#endif

template <Format FORMAT, class S>
void widen_row(S* to, const FewBits& f, const uint8_t* w, const float* scale, int columns) {
  constexpr int BYTES = UNIT_BYTES<FORMAT>;
  const int shift = f.shift();
  const float* zeros = scale + zeros_at<FORMAT>(columns, shift);
  const int64_t bytes = f.bytes(columns);
  for (int u = 0; u * UNIT < columns; ++u) {
    uint8_t last[BYTES] = {};
    const bool whole = (u + 1) * UNIT <= columns;
    if (!whole) std::memcpy(last, w + u * BYTES, bytes - u * BYTES);
    vf n[VECTORS];
    numbers<FORMAT>(whole ? w + u * BYTES : last, zeros[u >> shift], n);
    if constexpr (FORMAT != INT8)
      for (int v = 0; v < VECTORS; v += 2) {
        const vf even = n[v], odd = n[v + 1];
        n[v] = __builtin_shuffle(even, odd, FIRST_HALF);
        n[v + 1] = __builtin_shuffle(even, odd, FIRST_HALF + LANES / 2);
      }
    const vf by = splat(scale[u >> shift]);
    for (int v = 0; v < VECTORS; ++v) {
      const int at = u * UNIT + v * LANES;
      if (at + LANES <= columns) store(to + at, n[v] * by, LANES);
      else store(to + at, n[v] * by, columns - at);
    }
  }
}

}  // namespace hg
