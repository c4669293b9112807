// exp for vectors of arguments <= 0: what softmax and log-sum-exp need once the maximum is taken off.
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
  static constexpr int kDegree = 7;                 // Taylor's remainder is below 6e-9
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kRound = 0x1.8p52 + 1023;
  static constexpr double kLowest = -709;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr int kDegree = 13;  // 5e-18
};

constexpr double inverse_factorial(int n) { return n == 0 ? 1 : inverse_factorial(n - 1) / n; }

// exp(x) = 2^n exp(r), x = n ln 2 + r, |r| <= ln 2 / 2. Within 1 unit in the last place; below the smallest normal
// number, and so for -inf, it is 0; NaN stays NaN.
template <class A>
ALWAYS_INLINE vec<A> exp_of_nonpositive(vec<A> x) {
  using C = ExpConstants<A>;
  x = maximum(broadcast(C::kLowest), x);
  const vec<A> shifted = x * A(1.4426950408889634) + C::kRound;
  const vec<A> n = shifted - C::kRound;
  const vec<A> r = (x - n * C::kLn2High) - n * C::kLn2Low;
  vec<A> polynomial = broadcast(A(inverse_factorial(C::kDegree)));
#pragma GCC unroll 16
  for (int i = C::kDegree - 1; i >= 0; --i) polynomial = polynomial * r + A(inverse_factorial(i));
  return polynomial * (vec<A>)((vec<typename C::Bits>)shifted << C::kMantissaBits);
}

}  // namespace CPU_TARGET
