// Products of GGUF's blocks with few rows of half types, by integers, as quantized_fixed.h has them for the others.
//
// Of blocks of 32 weights, the inputs that meet one become 16-bit numbers with a scale, as for int8. Of 256, a block's
// inputs have one scale, and their numbers (15 bits) are multiplied by the weights' codes times their scales of 6 or 8
// bits: sums over a block are exact. What the minima (or Q6_K's -32) take off is a product with sums of 16 inputs.
#pragma once
#include "quantized_blocks.h"
#include "quantized_fixed.h"

namespace hg {

#ifdef __AVX2__
// 16-bit numbers: a vector holds the codes of WORDS columns.
#ifdef HG_AVX512
constexpr int WORDS = 32;
#else
constexpr int WORDS = 16;
#endif
typedef uint16_t wv __attribute__((vector_size(WORDS * 2)));
typedef uint16_t wv_u __attribute__((vector_size(WORDS * 2), aligned(2), may_alias));

HG_INLINE wv words_of(const uint8_t* p) {
#ifdef HG_AVX512
  return (wv)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
#else
  return (wv)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
#endif
}

// s + a * b, neighbours added
HG_INLINE vi dot_words(vi s, wv a, wv b) {
#if defined(HG_AVX512) && defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((__m512i)s, (__m512i)a, (__m512i)b);
#elif defined(HG_AVX512)
  return s + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return s + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

HG_INLINE vf floats_of(vi x) { return __builtin_convertvector(x, vf); }

// ---- inputs of blocks of 256 ----------------------------------------------------------------------------------------

// A row of `columns` inputs: 16-bit numbers; then for each block a float, their scale; for each block the sums of its
// inputs, as their numbers have them, over every 32 (8 floats), and over every 16 (16 floats).
constexpr int super_scales_at(int columns) { return columns / 2; }
constexpr int super_sums_at(int columns) { return columns / 2 + columns / 256; }
constexpr int SUPER_SUMS = 24;
constexpr int super_floats(int columns) { return super_sums_at(columns) + columns / 256 * SUPER_SUMS; }
constexpr float SUPER_MOST = 16383;  // with Q6_K's largest codes and scales a block's sums are below 2^31

inline void arrange_super(float* to, const float* x, int f0, int n, int columns) {
  for (int at = 0; at < n; at += 256) {
    const float* in = x + at;
    const int block = (f0 + at) / 256;
    int16_t* numbers = (int16_t*)to + f0 + at;
    float *sums = to + super_sums_at(columns) + block * SUPER_SUMS, *scale = to + super_scales_at(columns) + block;
    float largest = 0, kept = 0;
    for (int i = 0; i < 256; ++i) {
      const float a = std::fabs(in[i]);
      largest = a > largest ? a : largest;
      kept += a * 0.f;  // NaN where one is no finite number
    }
    const bool finite = kept == 0.f, any = finite && largest > 1e-30f;
    *scale = !finite ? NAN : any ? largest / SUPER_MOST : 0.f;
    const float by = any ? SUPER_MOST / largest : 0.f;
    for (int g = 0; g < 16; ++g) {
      int32_t sum = 0;
      for (int i = 16 * g; i < 16 * g + 16; ++i) {
        const int32_t q = any ? int32_t(std::nearbyint(in[i] * by)) : 0;
        numbers[i] = int16_t(q), sum += q;
      }
      sums[8 + g] = float(sum) * *scale;
    }
    for (int g = 0; g < 8; ++g) sums[g] = sums[8 + 2 * g] + sums[9 + 2 * g];
  }
}

// ---- products with blocks of 256 ------------------------------------------------------------------------------------

// What a block has beside its codes: scales, each twice in 32 bits (of 32 columns; Q6_K: of 16); what the sums of the
// inputs are multiplied by; and the floats that go with the two.
template <Format FORMAT>
struct Head {
  static constexpr int SUMS = FORMAT == Q6_K ? 16 : 8, SUMS_AT = FORMAT == Q6_K ? 8 : 0;
  static constexpr int PER = SUMS == 8 || LANES == 8 ? 8 : 16;  // minima in a vector
  typedef float part __attribute__((vector_size(PER * 4)));
  typedef float part_u __attribute__((vector_size(PER * 4), aligned(4), may_alias));
  alignas(64) int32_t scales[16];
  part minima[SUMS / PER];
  float d, m;
};

template <Format FORMAT>
HG_INLINE void read_head(const uint8_t* b, Head<FORMAT>& h) {
  if constexpr (FORMAT == Q6_K) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)(b + 192));
#ifdef HG_AVX512
    const vi wide[] = {(vi)_mm512_cvtepi8_epi32(bytes)};
#else
    const vi wide[] = {(vi)_mm256_cvtepi8_epi32(bytes), (vi)_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
#endif
    for (int v = 0; v < 16 / LANES; ++v) {
      *(vi*)(h.scales + v * LANES) = (wide[v] & 0xffff) | wide[v] << 16;
      h.minima[v] = floats_of(wide[v]);
    }
    h.d = half_at(b + 208), h.m = 32 * h.d;
  } else {  // six_bits, in a vector: the first bytes are scales, then come minima
    const __m128i v = _mm_loadu_si128((const __m128i*)(b + 4));
    const __m128i first = _mm_and_si128(v, _mm_set1_epi8(63));
    const __m128i third = _mm_srlv_epi32(_mm_shuffle_epi32(v, 0xaa), _mm_setr_epi32(0, 4, 0, 0));
    const __m128i last = _mm_or_si128(_mm_and_si128(third, _mm_set1_epi8(15)),
                                      _mm_and_si128(_mm_srli_epi32(v, 2), _mm_set1_epi8(0x30)));
    const __m256i both = _mm256_broadcastsi128_si256(_mm_unpacklo_epi32(first, last));
    const __m256i twice = _mm256_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1,  //
                                           4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7, -1);
    const __m256i wide = _mm256_setr_epi8(8, -1, -1, -1, 9, -1, -1, -1, 10, -1, -1, -1, 11, -1, -1, -1,  //
                                          12, -1, -1, -1, 13, -1, -1, -1, 14, -1, -1, -1, 15, -1, -1, -1);
    _mm256_store_si256((__m256i*)h.scales, _mm256_shuffle_epi8(both, twice));
    h.minima[0] = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(both, wide));
    const __m128 two = _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)b));
    h.d = two[0], h.m = two[1];
  }
  // the scales are to be read from memory, each spread by its load: taken out of registers they cost two shuffles
  asm("" : "+m"(h.scales));
}

template <Format FORMAT>
HG_INLINE wv scales_at(const Head<FORMAT>& h, int column) {
#ifdef HG_AVX512
  if constexpr (FORMAT != Q6_K) return (wv)_mm512_set1_epi32(h.scales[column / 32]);
  const __m512i one = _mm512_set1_epi32(h.scales[column / 16]);
  return (wv)_mm512_mask_set1_epi32(one, 0xff00, h.scales[column / 16 + 1]);
#else
  return (wv)_mm256_set1_epi32(h.scales[column / (FORMAT == Q6_K ? 16 : 32)]);
#endif
}

// Calls each(codes, column) for the codes of all columns of a block.
template <Format FORMAT, class Each>
HG_INLINE void codes_of(const uint8_t* b, Each each) {
#pragma GCC unroll 2
  for (int at = 0; at < 32; at += WORDS) {
    if constexpr (FORMAT == Q6_K) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const wv one = words_of(b + 64 * half + at), two = words_of(b + 64 * half + 32 + at);
        const wv high = words_of(b + 128 + 32 * half + at);
        const int column = 128 * half + at;
        each((one & 15) | (high << 4 & 48), column);
        each((two & 15) | (high << 2 & 48), column + 32);
        each(one >> 4 | (high & 48), column + 64);
        each(two >> 4 | (high >> 2 & 48), column + 96);
      }
    } else {
      wv fifth{};
      if constexpr (FORMAT == Q5_K) fifth = words_of(b + 16 + at);
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; ++pair) {
        const wv both = words_of(b + (FORMAT == Q5_K ? 48 : 16) + 32 * pair + at);
        wv low = both & 15, high = both >> 4;
        if constexpr (FORMAT == Q5_K) low |= (fifth >> 2 * pair & 1) << 4, high |= (fifth >> (2 * pair + 1) & 1) << 4;
        each(low, 64 * pair + at);
        each(high, 64 * pair + 32 + at);
      }
    }
  }
}

// out[m * stride] = <row at w, x[m]> for M inputs as `arrange_super` leaves them.
template <Format FORMAT, int M>
__attribute__((noinline)) void dot_super(const uint8_t* w, int columns, const float* const* x, float* out, int stride) {
  using H = Head<FORMAT>;
  const int scales = super_scales_at(columns), inputs = super_sums_at(columns) + H::SUMS_AT;
  vf sums[M] = {};
  typename H::part less[M] = {};
  for (int g = 0; g < columns / 256; ++g, w += block_bytes(FORMAT)) {
    prefetch(w + BYTES_AHEAD), prefetch(w + BYTES_AHEAD + 64), prefetch(w + BYTES_AHEAD + 128);
    H head;
    read_head<FORMAT>(w, head);
    vi parts[M] = {};
    codes_of<FORMAT>(w, [&](wv codes, int column) __attribute__((always_inline)) {
      const wv scaled = codes * scales_at<FORMAT>(head, column);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        parts[m] = dot_words(parts[m], scaled, *(const wv_u*)((const int16_t*)x[m] + 256 * g + column));
    });
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      sums[m] = floats_of(parts[m]) * head.d * splat(x[m][scales + g]) + sums[m];
#pragma GCC unroll 2
      for (int v = 0; v < H::SUMS / H::PER; ++v)
        less[m] = *(const typename H::part_u*)(x[m] + inputs + SUPER_SUMS * g + v * H::PER) * head.minima[v] * head.m + less[m];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const auto s = less[m];
    float off;
    if constexpr (H::PER == LANES) off = sum(s);
    else off = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
    out[m * stride] = sum(sums[m]) - off;
  }
}

// ---- products with blocks of 32 -------------------------------------------------------------------------------------

// The scales of a row of `blocks`, into `to`, which has room for as many more floats: they are brought together first.
template <Format FORMAT>
HG_INLINE void block_scales(float* to, const uint8_t* w, int blocks) {
  constexpr int BYTES = FORMAT == GGUF_MXFP4 ? 1 : 2;
  uint8_t* together = (uint8_t*)(to + blocks);
  for (int g = 0; g < blocks; ++g) std::memcpy(together + BYTES * g, w + g * block_bytes(FORMAT), BYTES);
  for (int g = 0; g < blocks; g += LANES) {
    uint8_t some[BYTES * LANES] = {};
    const bool whole = g + LANES <= blocks;
    if (!whole) std::memcpy(some, together + BYTES * g, BYTES * (blocks - g));
    const uint8_t* from = whole ? together + BYTES * g : some;
    vf scales;
    if constexpr (FORMAT == GGUF_MXFP4) {
      const vi e = wide_ints<false>(from);
      scales = as_float(e < 2 ? 0x00200000 << (e & 1) : (e - 1) << 23);
    } else {
#ifdef HG_AVX512
      scales = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#else
      scales = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#endif
    }
    store(to + g, scales, std::min(LANES, blocks - g));
  }
}

// The 32 numbers of a block as bytes; those of mxfp4 are twice as large as they should be.
template <Format FORMAT>
HG_INLINE __m256i block_numbers(const uint8_t* b) {
  if constexpr (FORMAT == Q8_0) return _mm256_loadu_si256((const __m256i*)(b + 2));
  const __m128i nibbles = _mm_loadu_si128((const __m128i*)(b + (FORMAT == GGUF_MXFP4 ? 1 : 2)));
  const __m256i shifted = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(nibbles), _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
  const __m256i codes = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
  if constexpr (FORMAT == Q4_0) return _mm256_sub_epi8(codes, _mm256_set1_epi8(8));
  const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}

// As dot_super, for x[m] as `arrange_fixed` leaves them; `buffer` takes the scales of a row, twice.
template <Format FORMAT, int M>
__attribute__((noinline)) void dot_block(const uint8_t* w, int columns, const float* const* x, float* out, int stride,
                                         float* buffer) {
  const int blocks = columns / 32, scales = fixed_scales_at(columns);
  block_scales<FORMAT>(buffer, w, blocks);
  constexpr int CHAINS = M <= 2 ? 2 : 1;  // sums that do not wait for each other
  vf sums[CHAINS][M] = {};
  auto block = [&](vf(&to)[M], int g) __attribute__((always_inline)) {
    const __m256i bytes = block_numbers<FORMAT>(w + g * block_bytes(FORMAT));
    const vf by = splat(buffer[g]);
#ifdef HG_AVX512
    const wv numbers[] = {(wv)_mm512_cvtepi8_epi16(bytes)};
#else
    const wv numbers[] = {(wv)_mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)),
                          (wv)_mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1))};
#endif
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      vi part{};
#pragma GCC unroll 2
      for (int v = 0; v < 32 / WORDS; ++v)
        part = dot_words(part, numbers[v], *(const wv_u*)((const int16_t*)x[m] + 32 * g + v * WORDS));
      to[m] = floats_of(part) * by * splat(x[m][scales + g]) + to[m];
    }
  };
  int g = 0;
  for (; g + CHAINS <= blocks; g += CHAINS) {
    prefetch(w + g * block_bytes(FORMAT) + BYTES_AHEAD);
#pragma GCC unroll 2
    for (int c = 0; c < CHAINS; ++c) block(sums[c], g + c);
  }
  for (; g < blocks; ++g) block(sums[0], g);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) out[m * stride] = sum(CHAINS > 1 ? sums[0][m] + sums[CHAINS - 1][m] : sums[0][m]);
}
#endif

}  // namespace hg
