// Products of weights of few bits with few rows of half types, by integers: the inputs that meet one scale of weights
// become 16-bit numbers with a scale of their own, which is finer than what bf16 and fp16 hold beside their largest.
// Sums of a group are exact; a NaN or an infinity among its inputs makes the row's outputs NaN.
//
// For every x86 CPU with AVX2, in vectors of 256 bits whatever LANES is: reading the weights is the work.
#pragma once
#include "quantized.h"

namespace hg {

#ifdef __AVX2__
constexpr bool FIXED_POINT = true;

// Where a row of `columns` inputs has its scales, in floats from its beginning, and how long it is with them.
constexpr int fixed_scales_at(int columns) { return padded(columns) / 2; }
constexpr int fixed_floats(int columns) { return fixed_scales_at(columns) + padded(columns) / UNIT; }

// Inputs f0 .. f0+n of a row of `columns`, f0 a multiple of w's group, into the row `to`: 16-bit numbers in the order
// in which a unit's weights come (for nibbles the 16 even columns, then the odd ones), then a scale for each group.
inline void arrange_fixed(float* to, const float* x, int f0, int n, int columns, const FewBits& w) {
  int16_t* numbers = (int16_t*)to + f0;
  float* scales = to + fixed_scales_at(columns) + f0 / w.group;
  for (int g0 = 0; g0 < n; g0 += int(w.group)) {
    const int here = std::min(int(w.group), n - g0);
    float in[128] = {}, largest = 0;
    std::copy_n(x + g0, here, in);
    bool finite = true;
    for (int i = 0; i < here; ++i) {
      const float a = std::fabs(in[i]);
      finite &= a <= 3.4028235e38f;
      largest = a > largest ? a : largest;
    }
    const bool any = finite && largest > 1e-30f;  // its reciprocal is a number
    *scales++ = !finite ? NAN : any ? largest / 32767 * (w.format == MXFP4 ? 0.5f : 1.f) : 0.f;
    const float by = any ? 32767 / largest : 0.f;
    for (int i = 0; i < padded(here); ++i) {
      const int at = i % UNIT;
      const float from = w.nibbles() ? in[i - at + (at < 16 ? 2 * at : 2 * at - 31)] : in[i];
      numbers[g0 + i] = any ? int16_t(std::lrintf(from * by)) : 0;
    }
  }
}

// The numbers of a unit; those of mxfp4 are twice as large as they should be. `zero` is UINT4's.
template <Format FORMAT>
HG_INLINE void shorts(const uint8_t* p, __m256i zero, __m256i (&w)[2]) {
  if constexpr (FORMAT == INT8) {
    w[0] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
    w[1] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + 16)));
    return;
  }
  const __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  w[0] = _mm256_and_si256(both, _mm256_set1_epi16(15));
  w[1] = _mm256_srli_epi16(both, 4);
  for (__m256i& n : w) {
    if constexpr (FORMAT == INT4) {
      n = _mm256_sub_epi16(n, _mm256_set1_epi16(8));
    } else if constexpr (FORMAT == UINT4) {
      n = _mm256_sub_epi16(n, zero);
    } else {  // magnitudes by the last three bits; the fourth becomes the sign of what says whether to negate
      const __m256i table = _mm256_set1_epi64x(0x0c08060403020100);
      n = _mm256_sign_epi16(_mm256_shuffle_epi8(table, n), _mm256_slli_epi16(n, 12));
    }
  }
}

// As dot_units, with x[m] as `arrange_fixed` leaves them; a group is summed before its scales.
template <Format FORMAT, int M, int R>
__attribute__((noinline)) void dot_fixed(const uint8_t* w, int64_t r, const float* const (&scale)[R], int shift,
                                         int columns, int64_t bytes, const float* const* x, float* out, int stride) {
  constexpr int BYTES = UNIT_BYTES<FORMAT>;
  const int units = padded(columns) / UNIT, whole = columns / UNIT, scales = fixed_scales_at(columns);
  const int zeros = zeros_at<FORMAT>(columns, shift);
  __m256 sums[R][M] = {};
  const uint8_t* next = w + BYTES_AHEAD;
  for (int u0 = 0, g = 0; u0 < units; u0 += 1 << shift, ++g) {
    __m256i parts[R][M] = {}, zero[R];
#pragma GCC unroll 2
    for (int i = 0; i < R; ++i) zero[i] = _mm256_set1_epi16(FORMAT == UINT4 ? short(int(scale[i][zeros + g])) : 0);
    auto unit = [&](int i, const uint8_t* at, int u) __attribute__((always_inline)) {
      __m256i n[2];
      shorts<FORMAT>(at, zero[i], n);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const __m256i* in = (const __m256i*)((const int16_t*)x[m] + u * UNIT);
        parts[i][m] = _mm256_add_epi32(parts[i][m], _mm256_madd_epi16(n[0], _mm256_loadu_si256(in)));
        parts[i][m] = _mm256_add_epi32(parts[i][m], _mm256_madd_epi16(n[1], _mm256_loadu_si256(in + 1)));
      }
    };
    const int u1 = u0 + (1 << shift);
    for (int u = u0; u < std::min(u1, whole); ++u, next += R * BYTES) {
      prefetch(next);
#pragma GCC unroll 2
      for (int i = 0; i < R; ++i) unit(i, w + i * r + u * BYTES, u);
    }
    if (u1 > whole && units > whole)
#pragma GCC unroll 2
      for (int i = 0; i < R; ++i) {
        uint8_t last[BYTES] = {};  // what lies beyond the row is not to be touched
        std::memcpy(last, w + i * r + whole * BYTES, bytes - whole * BYTES);
        unit(i, last, whole);
      }
#pragma GCC unroll 2
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        sums[i][m] += _mm256_cvtepi32_ps(parts[i][m]) * _mm256_set1_ps(scale[i][g] * x[m][scales + g]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m256 s = sums[i][m];
      out[m * stride + i] = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
    }
}
#else
constexpr bool FIXED_POINT = false;
#endif

}  // namespace hg
