// exp for vectors, without overflow handling: softmax and log-sum-exp first subtract a value near the maximum.
#pragma once

#include "common/simd.h"

namespace CPU_TARGET {

template <class A>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr float kRound = 0x1.8p23f + 127;  // adding it rounds and leaves n + 127, 2^n's exponent field, below
  static constexpr float kLowest = -88;             // n = -127: the exponent field, and so the result, is 0
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // n * kLn2High is exact
  // exp(r) for |r| <= ln 2 / 2, with the smallest maximum relative error (3e-9) of all polynomials that begin 1 + r.
  static constexpr float kPolynomial[] = {1, 1, 0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.1239e2p-7f,
                                          0x1.6a2434p-10f};
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kRound = 0x1.8p52 + 1023;
  static constexpr double kLowest = -709;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  // Taylor; the remainder is 5e-18.
  static constexpr double kPolynomial[] = {1,           1,            1. / 2,        1. / 6,     1. / 24,
                                           1. / 120,    1. / 720,     1. / 5040,     1. / 40320, 1. / 362880,
                                           1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
};

// exp(x) = 2^n exp(r), x = n ln 2 + r, |r| <= ln 2 / 2, for x <= 88 (float) or 709 (double). Within 1.2 units in the
// last place; below the smallest normal number, and so for -inf, it is 0; NaN stays NaN.
template <class A>
ALWAYS_INLINE vec<A> exp(vec<A> x) {
  using C = ExpConstants<A>;
  constexpr int degree = sizeof C::kPolynomial / sizeof(A) - 1;
  x = maximum(broadcast(C::kLowest), x);
  const vec<A> shifted = x * A(1.4426950408889634) + C::kRound;
  const vec<A> n = shifted - C::kRound;
  const vec<A> r = (x - n * C::kLn2High) - n * C::kLn2Low;
  vec<A> polynomial = broadcast(C::kPolynomial[degree]);
#pragma GCC unroll 16
  for (int i = degree - 1; i >= 0; --i) polynomial = polynomial * r + C::kPolynomial[i];
  return polynomial * (vec<A>)((vec<typename C::Bits>)shifted << C::kMantissaBits);
}

}  // namespace CPU_TARGET
