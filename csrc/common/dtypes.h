// Element types as kernels see them: 16-bit floats are storage, arithmetic is in accumulate_t.
#pragma once

#include <stdint.h>

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;
