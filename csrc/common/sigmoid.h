// The logistic function for vectors.
#pragma once

#include "common/exp.h"

namespace CPU_TARGET {

// s = 1 / (1 + exp(-x)) and 1 - s, both to full precision, for any x, with one exponential.
template <class A>
struct Sigmoid {
  vec<A> value, rest;
};

template <class A>
ALWAYS_INLINE Sigmoid<A> sigmoid(vec<A> x) {
  const vec<A> e = exp<A>(x > 0 ? -x : x);  // exp(-|x|) cannot overflow
  const vec<A> larger = 1 / (1 + e), smaller = e * larger;
  return {x > 0 ? larger : smaller, x > 0 ? smaller : larger};
}

}  // namespace CPU_TARGET
