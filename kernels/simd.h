// Vectors of LANES floats, the three storage types, and conversions between them.
//
// With AVX-512 the hot pieces are intrinsics; everywhere else the compiler's vector extension says the same.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HG_AVX512 1
#endif
#if defined(HG_AVX512) && defined(__AVX512BF16__)
#define HG_BF16_DOT 1
#endif

namespace hg {

#ifdef HG_AVX512
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef float vf_u __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float word __attribute__((may_alias, aligned(2)));  // 32 bits of an operand, wherever it lies

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

#define HG_INLINE inline __attribute__((always_inline))

#ifdef HG_AVX512
HG_INLINE vf splat(float x) { return (vf)_mm512_set1_ps(x); }
#else
HG_INLINE vf splat(float x) { return vf{x, x, x, x, x, x, x, x}; }
#endif
HG_INLINE vi as_int(vf x) { return (vi)x; }
HG_INLINE vf as_float(vi x) { return (vf)x; }

HG_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

HG_INLINE float to_float(float x) { return x; }
HG_INLINE float to_float(bf16 x) {
  uint32_t w = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &w, 4);
  return f;
}
HG_INLINE float to_float(f16 x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 h;
  std::memcpy(&h, &x, 2);
  return h;
#else
  const int e = x.bits >> 10 & 31, m = x.bits & 1023;
  const float f = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(float(1024 + m), e - 25) : std::ldexp(float(m), -24);
  return x.bits & 0x8000 ? -f : f;
#endif
}

HG_INLINE bf16 to_bf16(float f) {  // round to nearest even, NaN stays NaN
  uint32_t w;
  std::memcpy(&w, &f, 4);
  if ((w & 0x7fffffffu) > 0x7f800000u) return {uint16_t((w >> 16) | 0x40)};
  return {uint16_t((w + 0x7fffu + ((w >> 16) & 1)) >> 16)};
}
HG_INLINE void from_float(float f, float& out) { out = f; }
HG_INLINE void from_float(float f, bf16& out) { out = to_bf16(f); }
HG_INLINE void from_float(float f, f16& out) {  // round to nearest even
#ifdef __F16C__
  out.bits = uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const __fp16 h = f;
  std::memcpy(&out, &h, 2);
#else
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float a = std::fabs(f);
  if (!(a <= 65519.99609375f)) { out.bits = sign | (a != a ? 0x7e00 : 0x7c00); return; }
  int e;
  std::frexp(a, &e);  // a = [0.5, 1) * 2^e
  if (a == 0) e = -14;
  const int shift = e < -13 ? -24 : e - 11;  // the unit of the last place
  const float q = std::nearbyint(std::ldexp(a, -shift));
  out.bits = uint16_t(sign + (e < -13 ? int(q) : ((e + 14) << 10) + int(q) - 1024));
#endif
}

#ifdef HG_AVX512
HG_INLINE __mmask16 mask16(int n) {
  return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
}
HG_INLINE __mmask32 mask32(int n) {
  return n >= 32 ? __mmask32(~0u) : n <= 0 ? __mmask32(0) : __mmask32((1u << n) - 1);
}

HG_INLINE __m256i bf16_of(vf x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh((__m512)x);
#else
  __m512i w = (__m512i)x;
  __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(w, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(w, _mm512_set1_epi32(0x7fff)), lsb), 16);
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(r);
#endif
}
HG_INLINE vf float_of_bf16(__m256i x) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

// n lanes from p; the rest is zero and its memory is not touched
HG_INLINE vf load(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps(mask16(n), p); }
HG_INLINE vf load(const bf16* p, int n) { return float_of_bf16(_mm256_maskz_loadu_epi16(mask16(n), p)); }
HG_INLINE vf load(const f16* p, int n) { return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask16(n), p)); }
HG_INLINE void store(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, mask16(n), (__m512)x); }
HG_INLINE void store(bf16* p, vf x, int n) { _mm256_mask_storeu_epi16(p, mask16(n), bf16_of(x)); }
HG_INLINE void store(f16* p, vf x, int n) {
  _mm256_mask_storeu_epi16(p, mask16(n), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
template <class T>
HG_INLINE vf load(const T* p, int n) {
  vf x{};
  for (int i = 0; i < LANES; ++i)
    if (i < n) x[i] = to_float(p[i]);
  return x;
}
template <class T>
HG_INLINE void store(T* p, vf x, int n) {
  for (int i = 0; i < LANES; ++i)
    if (i < n) from_float(x[i], p[i]);
}
#endif

// w * x + s, rounded once where the CPU can. Left to the compiler, some lanes of an unrolled loop are rounded twice.
HG_INLINE vf multiply_add(vf w, vf x, vf s) {
#if defined(HG_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)w, (__m512)x, (__m512)s);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)w, (__m256)x, (__m256)s);
#else
  return w * x + s;
#endif
}

HG_INLINE float sum(vf x) {
#ifdef HG_AVX512
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s = 0;
  for (int i = 0; i < LANES; ++i) s += x[i];
  return s;
#endif
}

HG_INLINE vf vmin(vf a, vf b) { return a > b ? b : a; }  // NaN in a stays
HG_INLINE vf vmax(vf a, vf b) { return a < b ? b : a; }

// e^x to about 1 ulp of fp32: 2^n * p(r), |r| <= ln2/2
HG_INLINE vf vexp(vf x0) {
  vf x = vmax(vmin(x0, splat(88.37f)), splat(-87.33f));
  vf shift = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  vf n = x * 1.44269504088896341f + shift;
  vi e = as_int(n) << 23;
  n = n - shift;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return x0 > 88.72f ? splat(INFINITY) : as_float(as_int(p) + e);
}
HG_INLINE vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

// erf by Abramowitz & Stegun 7.1.26, |error| <= 1.5e-7
HG_INLINE vf verf(vf x) {
  vf ax = x < 0 ? -x : x;
  vf t = 1.0f / (1.0f + 0.3275911f * ax);
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  vf y = 1.0f - p * t * vexp(-ax * ax);
  return x < 0 ? -y : y;
}

}  // namespace hg
