// GGUF's blocks (gguf_blocks.py says what they mean): from bytes to floats, to widened rows, and their products with
// rows of floats.
#pragma once
#include "quantized.h"

namespace hg {

constexpr int MOST_WEIGHTS = 256;  // in a block

HG_INLINE float half_at(const uint8_t* p) {
  f16 h;
  std::memcpy(&h, p, 2);
  return to_float(h);
}

// 2^(e - 128): the scale of numbers that are twice as large as they should be; 255 is no NaN.
HG_INLINE float half_power(uint32_t e) {
  const uint32_t bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// The 8 scales and the 8 minima of 6 bits each in 12 bytes, a byte each, the first in the lowest.
struct SixBits {
  uint64_t scales, minima;
};
HG_INLINE SixBits six_bits(const uint8_t* p) {
  uint32_t a, b, c;
  std::memcpy(&a, p, 4), std::memcpy(&b, p + 4, 4), std::memcpy(&c, p + 8, 4);
  const uint32_t four = 0x0f0f0f0f, two = 0x30303030, six = 0x3f3f3f3f;
  return {(a & six) | uint64_t((c & four) | (a >> 2 & two)) << 32,
          (b & six) | uint64_t((c >> 4 & four) | (b >> 2 & two)) << 32};
}

// The weights of a block.
template <Format FORMAT>
HG_INLINE void widen_block(float* __restrict to, const uint8_t* __restrict b) {
  if constexpr (FORMAT == Q8_0) {
    const float d = half_at(b);
    for (int i = 0; i < 32; ++i) to[i] = d * float(int8_t(b[2 + i]));
  } else if constexpr (FORMAT == Q4_0) {
    const float d = half_at(b);
    for (int i = 0; i < 16; ++i) to[i] = d * float(int(b[2 + i] & 15) - 8);
    for (int i = 0; i < 16; ++i) to[16 + i] = d * float(int(b[2 + i] >> 4) - 8);
  } else if constexpr (FORMAT == GGUF_MXFP4) {
    const vf d = splat(half_power(b[0]));
    for (int i = 0; i < 16; i += LANES) {
      const vi both = wide_ints<false>(b + 1 + i);
      const vf low = nibble<MXFP4>(both & 15), high = nibble<MXFP4>(both >> 4);
      *(vf_u*)(to + i) = d * (low + low), *(vf_u*)(to + 16 + i) = d * (high + high);
    }
  } else if constexpr (FORMAT == Q6_K) {
    const float d = half_at(b + 208);
    for (int half = 0; half < 2; ++half) {
      const uint8_t *low = b + 64 * half, *high = b + 128 + 32 * half;
      const int8_t* scales = (const int8_t*)b + 192 + 8 * half;
      for (int part = 0; part < 4; ++part)
        for (int i = 0; i < 32; ++i) {
          const int q = (low[32 * (part & 1) + i] >> (part & 2) * 2 & 15) | (high[i] >> 2 * part & 3) << 4;
          to[128 * half + 32 * part + i] = d * float(scales[2 * part + i / 16]) * float(q - 32);
        }
    }
  } else {
    const auto [scales, minima] = six_bits(b + 4);
    const float d = half_at(b), m = half_at(b + 2);
    const uint8_t *fifth = b + 16, *nibbles = b + (FORMAT == Q5_K ? 48 : 16);
    for (int j = 0; j < 8; ++j) {
      const float by = d * float(scales >> 8 * j & 255), less = m * float(minima >> 8 * j & 255);
      for (int i = 0; i < 32; ++i) {
        int q = nibbles[32 * (j / 2) + i] >> 4 * (j & 1) & 15;
        if (FORMAT == Q5_K) q |= (fifth[i] >> j & 1) << 4;
        to[32 * j + i] = by * float(q) - less;
      }
    }
  }
}

template <Format FORMAT, class S>
void widen_blocks(S* to, const uint8_t* w, int columns) {
  constexpr int WEIGHTS = block_weights(FORMAT);
  float wide[WEIGHTS];
  for (int i = 0; i < columns; i += WEIGHTS, w += block_bytes(FORMAT)) {
    if constexpr (std::is_same_v<S, float>) {
      widen_block<FORMAT>(to + i, w);
    } else {
      widen_block<FORMAT>(wide, w);
      for (int k = 0; k < WEIGHTS; k += LANES) store(to + i + k, *(const vf_u*)(wide + k), LANES);
    }
  }
}

// out[m * stride] = <row at w, x[m]> for M inputs.
template <Format FORMAT, int M>
__attribute__((noinline)) void dot_widened(const uint8_t* w, int columns, const float* const* x, float* out,
                                           int stride) {
  constexpr int WEIGHTS = block_weights(FORMAT);
  float wide[WEIGHTS];
  vf sums[M] = {};
  for (int i = 0; i < columns; i += WEIGHTS, w += block_bytes(FORMAT)) {
    prefetch(w + BYTES_AHEAD), prefetch(w + BYTES_AHEAD + 64), prefetch(w + BYTES_AHEAD + 128);
    widen_block<FORMAT>(wide, w);
    for (int k = 0; k < WEIGHTS; k += LANES)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[m] = *(const vf_u*)(wide + k) * *(const vf_u*)(x[m] + i + k) + sums[m];
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) out[m * stride] = sum(sums[m]);
}

}  // namespace hg
