// The activations of activation.py, a vector at a time, with their derivatives.
#pragma once
#include <cmath>

#include "simd.h"

namespace hg {

enum Kind { SILU, GELU, GELU_TANH, RELU, RELU2, IDENTITY };

// Up to where the gradient passes a clamp, whose slope exactly at the limit is 0 or 1; no clamp, no edge.
inline float edge_of(float limit, float slope_at_limit) {
  return slope_at_limit != 0 || std::isinf(limit) ? limit : std::nextafter(limit, 0.0f);
}

struct Activation {
  int kind;
  bool gated;
  float alpha, limit, up_shift;
  bool clamp_after;
  float edge;  // a gradient passes a clamp up to here: the limit, or the number below it

  // phi(g), and its derivative where D
  template <bool D>
  HG_INLINE vf phi(vf g, vf& d) const {
    const vf zero{};
    switch (kind) {
      case SILU: {
        vf s = vsigmoid(g * alpha);
        if (D) d = s + alpha * g * s * (1.0f - s);
        return g * s;
      }
      case GELU: {
        vf cdf = 0.5f + 0.5f * verf(g * 0.70710678118654752f);
        if (D) d = cdf + g * 0.39894228040143268f * vexp(g * g * -0.5f);
        return g * cdf;
      }
      case GELU_TANH: {
        const float c = 0.79788456080286536f, k = 0.044715f;
        vf t = 1.0f - 2.0f / (vexp(2.0f * c * (g + k * g * g * g)) + 1.0f);
        if (D) d = 0.5f + 0.5f * t + 0.5f * g * (1.0f - t * t) * c * (1.0f + 3.0f * k * g * g);
        return 0.5f * g * (1.0f + t);
      }
      case RELU:
        if (D) d = g > zero ? splat(1.0f) : zero;
        return g <= zero ? zero : g;
      case RELU2: {
        vf r = g <= zero ? zero : g;
        if (D) d = 2.0f * r;
        return r * r;
      }
      default:
        if (D) d = splat(1.0f);
        return g;
    }
  }

  HG_INLINE vf forward(vf g, vf u) const {
    vf unused;
    if (!gated) return phi<false>(g, unused);
    const vf top = splat(limit);
    if (!clamp_after) g = vmin(g, top);
    u = vmax(vmin(u, top), -top);
    vf a = phi<false>(g, unused);
    if (clamp_after) a = vmin(a, top);
    return a * (u + up_shift);
  }

  // a and d loss / d (g, u) for d loss / d a = da; slopes of a clamp are 1 up to `edge`
  HG_INLINE vf backward(vf g, vf u, vf da, vf& dg, vf& du) const {
    vf d;
    if (!gated) {
      vf a = phi<true>(g, d);
      dg = da * d;
      return a;
    }
    const vf top = splat(limit), last = splat(edge), zero{};
    vf gc = clamp_after ? g : vmin(g, top);
    vf uc = vmax(vmin(u, top), -top);
    vf a = phi<true>(gc, d);
    if (clamp_after) {
      d = a > last ? zero : d;
      a = vmin(a, top);
    } else {
      d = g > last ? zero : d;
    }
    vf us = uc + up_shift;
    dg = da * us * d;
    du = da * a;
    du = ((u > last) | (u < -last)) ? zero : du;
    return a * us;
  }
};

}  // namespace hg
