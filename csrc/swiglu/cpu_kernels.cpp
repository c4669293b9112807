#include "swiglu/cpu_kernels.h"

#include "common/exp.h"

namespace CPU_TARGET {

// 1 / (1 + exp(-x)), and what it lacks to 1: both to full precision, for any x and with one exponential.
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

template <class X>
void swiglu(const X* x12, int64_t rows, int64_t H, X* y) {
  using A = accumulate_t<X>;
  for (int64_t row = 0; row < rows; ++row, x12 += 2 * H, y += H) {
    for_each_vector<A>(0, H, [&](int64_t h, auto part) {
      const vec<A> x1 = load(x12 + h, part), x2 = load(x12 + H + h, part);
      store(y + h, x1 * sigmoid<A>(x1).value * x2, part);
    });
  }
}

template <class X>
void swiglu_backward(const X* grad, const X* x12, int64_t rows, int64_t H, X* dx12) {
  using A = accumulate_t<X>;
  for (int64_t row = 0; row < rows; ++row, grad += H, x12 += 2 * H, dx12 += 2 * H) {
    for_each_vector<A>(0, H, [&](int64_t h, auto part) {
      const vec<A> g = load(grad + h, part), x1 = load(x12 + h, part), x2 = load(x12 + H + h, part);
      const Sigmoid<A> s = sigmoid<A>(x1);
      const vec<A> gs = g * s.value;
      store(dx12 + h, gs * x2 * (1 + x1 * s.rest), part);
      store(dx12 + H + h, gs * x1, part);
    });
  }
}

#define INSTANTIATE(X)                                         \
  template void swiglu(const X*, int64_t, int64_t, X*);        \
  template void swiglu_backward(const X*, const X*, int64_t, int64_t, X*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(fp16)

}  // namespace CPU_TARGET
