// Products of weights of few bits with few rows: every weight is read once, at the memory's rate, and widened in
// registers. Half types are multiplied as 16-bit integers where the CPU can (quantized_fixed.h), the others as floats.
#pragma once
#include "quantized_blocks_fixed.h"

namespace hg {

// Inputs x [n] in the order of a unit's numbers, zeros after the last up to a whole unit.
inline void arrange_floats(float* to, const float* x, int n, bool nibbles) {
  const int whole = padded(n);
  if (!nibbles) {
    std::memcpy(to, x, n * sizeof(float));
    std::fill(to + n, to + whole, 0.f);
    return;
  }
  for (int i = 0; i < whole; i += 2 * LANES)
    for (int l = 0; l < 2 * LANES; ++l) {
      const int column = i + (l < LANES ? 2 * l : 2 * (l - LANES) + 1);
      to[i + l] = column < n ? x[column] : 0.f;
    }
}

// Row o of an expert into to [columns].
template <class S>
void widen(S* to, const FewBits& w, int64_t slot, int o, int columns, float* buffer) {
  const uint8_t* row = w.row(slot, o);
  switch (w.format) {
    case Q8_0: return widen_blocks<Q8_0>(to, row, columns);
    case Q4_0: return widen_blocks<Q4_0>(to, row, columns);
    case GGUF_MXFP4: return widen_blocks<GGUF_MXFP4>(to, row, columns);
    case Q4_K: return widen_blocks<Q4_K>(to, row, columns);
    case Q5_K: return widen_blocks<Q5_K>(to, row, columns);
    case Q6_K: return widen_blocks<Q6_K>(to, row, columns);
    default: break;
  }
  const float* scale = scales_of(w, slot, o, columns, buffer);
  switch (w.format) {
    case INT8: return widen_row<INT8>(to, w, row, scale, columns);
    case INT4: return widen_row<INT4>(to, w, row, scale, columns);
    case UINT4: return widen_row<UINT4>(to, w, row, scale, columns);
    default: return widen_row<MXFP4>(to, w, row, scale, columns);
  }
}

// Rows of type T are multiplied by integers.
template <class T>
constexpr bool FIXED = FIXED_POINT && !std::is_same_v<T, float>;

// The length of a row of inputs, in floats, and inputs f0 .. f0+n put into it, f0 a multiple of UNIT and of w's group.
template <class T>
int input_floats(int columns, const FewBits& w) {
#ifdef __AVX2__
  if constexpr (FIXED<T>) return in_super(w.format) ? super_floats(columns) : fixed_floats(columns);
#endif
  (void)w;
  return padded(columns);
}
template <class T>
void arrange(float* to, const float* x, int f0, int n, int columns, const FewBits& w) {
#ifdef __AVX2__
  if constexpr (FIXED<T>)
    return in_super(w.format) ? arrange_super(to, x, f0, n, columns) : arrange_fixed(to, x, f0, n, columns, w);
#endif
  (void)columns;
  arrange_floats(to + f0, x, n, w.nibbles());
}

// out[m * stride + i] = <row i, x[m]> for R rows, `r` bytes apart, and M inputs. A unit is summed before its scale.
template <Format FORMAT, int M, int R>
__attribute__((noinline)) void dot_units(const uint8_t* w, int64_t r, const float* const (&scale)[R], int shift,
                                         int columns, int64_t bytes, const float* const* x, float* out, int stride) {
  constexpr int BYTES = UNIT_BYTES<FORMAT>;
  const int zeros = zeros_at<FORMAT>(columns, shift);
  vf sums[R][M] = {};
  auto unit = [&](int i, const uint8_t* at, int u) __attribute__((always_inline)) {
    vf n[VECTORS];
    numbers<FORMAT>(at, scale[i][zeros + (u >> shift)], n);
    const vf by = splat(scale[i][u >> shift]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const float* in = x[m] + u * UNIT;
      vf part = n[0] * *(const vf_u*)in;
#pragma GCC unroll 4
      for (int v = 1; v < VECTORS; ++v) part = n[v] * *(const vf_u*)(in + v * LANES) + part;
      sums[i][m] = by * part + sums[i][m];
    }
  };
  const int units = columns / UNIT;
  const uint8_t* next = w + BYTES_AHEAD;
  for (int u = 0; u < units; ++u, next += R * BYTES) {
    prefetch(next);
#pragma GCC unroll 2
    for (int i = 0; i < R; ++i) unit(i, w + i * r + u * BYTES, u);
  }
  if (columns % UNIT)
#pragma GCC unroll 2
    for (int i = 0; i < R; ++i) {
      uint8_t last[BYTES] = {};  // what lies beyond the row is not to be touched
      std::memcpy(last, w + i * r + units * BYTES, bytes - units * BYTES);
      unit(i, last, units);
    }
#pragma GCC unroll 2
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) out[m * stride + i] = sum(sums[i][m]);
}

template <bool INTEGERS, Format FORMAT, int M, int R>
void dot_together(const FewBits& w, int64_t slot, int o, int columns, const float* const* x, float* out, int stride,
                  float* buffer) {
  const float* scale[R];
  for (int i = 0; i < R; ++i) scale[i] = scales_of(w, slot, o + i, columns, buffer + i * scale_floats(columns));
#ifdef __AVX2__
  if constexpr (INTEGERS)
    return dot_fixed<FORMAT, M, R>(w.row(slot, o), w.r, scale, w.shift(), columns, w.bytes(columns), x, out, stride);
#endif
  dot_units<FORMAT, M, R>(w.row(slot, o), w.r, scale, w.shift(), columns, w.bytes(columns), x, out, stride);
}

// As dot_inputs, of one row in GGUF's blocks.
template <bool INTEGERS, Format FORMAT, int M>
void dot_in_blocks(const uint8_t* w, int columns, const float* const* x, float* out, int stride, float* buffer) {
#ifdef __AVX2__
  if constexpr (INTEGERS && in_super(FORMAT)) return dot_super<FORMAT, M>(w, columns, x, out, stride);
  else if constexpr (INTEGERS) return dot_block<FORMAT, M>(w, columns, x, out, stride, buffer);
#endif
  (void)buffer;
  dot_widened<FORMAT, M>(w, columns, x, out, stride);
}

template <bool INTEGERS, Format FORMAT, int M>
void dot_few(const FewBits& w, int64_t slot, int o, int rows, int columns, const float* const* x, float* out,
             int stride, float* buffer) {
  if constexpr (in_blocks(FORMAT)) {
    for (int i = 0; i < rows; ++i)
      dot_in_blocks<INTEGERS, FORMAT, M>(w.row(slot, o + i), columns, x, out + i, stride, buffer);
    return;
  } else {
  constexpr int R = M <= 2 ? 2 : 1;  // two rows share what is read of the inputs, where registers allow
  int i = 0;
  for (; i + R <= rows; i += R) dot_together<INTEGERS, FORMAT, M, R>(w, slot, o + i, columns, x, out + i, stride, buffer);
  for (; i < rows; ++i) dot_together<INTEGERS, FORMAT, M, 1>(w, slot, o + i, columns, x, out + i, stride, buffer);
  }
}

constexpr int TOGETHER = 8;  // inputs that a row of weights meets while its sums are in registers

// out[m * rows + i] = <row o + i of an expert, x[m]>, i < rows; `buffer` holds the scales of two rows.
template <bool INTEGERS, Format FORMAT>
void dot_inputs(const FewBits& w, int64_t slot, int o, int rows, int columns, const float* const* x, int M, float* out,
                float* buffer) {
  using Dot = void (*)(const FewBits&, int64_t, int, int, int, const float* const*, float*, int, float*);
  static constexpr Dot dot[] = {dot_few<INTEGERS, FORMAT, 1>, dot_few<INTEGERS, FORMAT, 2>, dot_few<INTEGERS, FORMAT, 3>, dot_few<INTEGERS, FORMAT, 4>,
                                dot_few<INTEGERS, FORMAT, 5>, dot_few<INTEGERS, FORMAT, 6>, dot_few<INTEGERS, FORMAT, 7>, dot_few<INTEGERS, FORMAT, 8>};
  if (M <= TOGETHER) return dot[M - 1](w, slot, o, rows, columns, x, out, rows, buffer);
  // several passes, over cuts of the weights small enough for all but the first to read them from the cache
  const int cut = std::max(8, int(16384 / std::max<int64_t>(1, w.bytes(columns))) & ~7);
  const int passes = (M + TOGETHER - 1) / TOGETHER;
  for (int i = 0; i < rows; i += cut)
    for (int pass = 0, m = 0, n; pass < passes; ++pass, m += n) {
      n = (M - m) / (passes - pass);
      dot[n - 1](w, slot, o + i, std::min(cut, rows - i), columns, x + m, out + m * rows + i, rows, buffer);
    }
}

template <class T>
void few_bits_product(const FewBits& w, int64_t slot, int o, int rows, int columns, const float* const* x, int M,
                      float* out, float* buffer) {
  switch (w.format) {
    case INT8: return dot_inputs<FIXED<T>, INT8>(w, slot, o, rows, columns, x, M, out, buffer);
    case INT4: return dot_inputs<FIXED<T>, INT4>(w, slot, o, rows, columns, x, M, out, buffer);
    case UINT4: return dot_inputs<FIXED<T>, UINT4>(w, slot, o, rows, columns, x, M, out, buffer);
    case Q8_0: return dot_inputs<FIXED<T>, Q8_0>(w, slot, o, rows, columns, x, M, out, buffer);
    case Q4_0: return dot_inputs<FIXED<T>, Q4_0>(w, slot, o, rows, columns, x, M, out, buffer);
    case GGUF_MXFP4: return dot_inputs<FIXED<T>, GGUF_MXFP4>(w, slot, o, rows, columns, x, M, out, buffer);
    case Q4_K: return dot_inputs<FIXED<T>, Q4_K>(w, slot, o, rows, columns, x, M, out, buffer);
    case Q5_K: return dot_inputs<FIXED<T>, Q5_K>(w, slot, o, rows, columns, x, M, out, buffer);
    case Q6_K: return dot_inputs<FIXED<T>, Q6_K>(w, slot, o, rows, columns, x, M, out, buffer);
    default: return dot_inputs<FIXED<T>, MXFP4>(w, slot, o, rows, columns, x, M, out, buffer);
  }
}

}  // namespace hg
