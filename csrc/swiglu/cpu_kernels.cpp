#include "swiglu/cpu_kernels.h"

#include "common/sigmoid.h"

namespace CPU_TARGET {

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

template <class A>
struct Gradient {
  vec<A> dx1, dx2;
};

template <class A>
ALWAYS_INLINE Gradient<A> gradient(vec<A> g, vec<A> x1, vec<A> x2, Sigmoid<A> s) {
  const vec<A> gs = g * s.value;
  return {gs * x2 * (1 + x1 * s.rest), gs * x1};
}

template <class X>
void swiglu_backward(const X* grad, const X* x12, int64_t rows, int64_t H, X* dx12) {
  using A = accumulate_t<X>;
  for (int64_t row = 0; row < rows; ++row, grad += H, x12 += 2 * H, dx12 += 2 * H) {
    for_each_vector<A>(0, H, [&](int64_t h, auto part) {
      const vec<A> x1 = load(x12 + h, part), x2 = load(x12 + H + h, part);
      const Gradient<A> d = gradient<A>(load(grad + h, part), x1, x2, sigmoid<A>(x1));
      store(dx12 + h, d.dx1, part);
      store(dx12 + H + h, d.dx2, part);
    });
  }
}

template <int N, class X>
ALWAYS_INLINE void swiglu_backward_rows(X* grad, const X* x12, int64_t H, X* dx12, double* sums) {
  using A = accumulate_t<X>;
  for_each_vector<A>(0, H, [&](int64_t h, auto part) {
    vec<A> dx1[N], dx2[N];
    for (int n = 0; n < N; ++n) {
      const int64_t gate = 2 * n * H + h;
      const vec<A> x1 = load(x12 + gate, part), x2 = load(x12 + gate + H, part);
      const Sigmoid<A> s = sigmoid<A>(x1);
      const Gradient<A> d = gradient<A>(load(grad + n * H + h, part), x1, x2, s);
      dx1[n] = d.dx1;
      dx2[n] = d.dx2;
      store(grad + n * H + h, x1 * s.value * x2, part);
      store(dx12 + gate, d.dx1, part);
      store(dx12 + gate + H, d.dx2, part);
    }
    add_to<N, A>(sums + h, dx1, part);
    add_to<N, A>(sums + H + h, dx2, part);
  });
}

template <class X>
void swiglu_backward_with_sums(X* grad, const X* x12, int64_t rows, int64_t H, X* dx12, double* sums) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    swiglu_backward_rows<kRows>(grad + row * H, x12 + row * 2 * H, H, dx12 + row * 2 * H, sums);
  for (; row < rows; ++row)
    swiglu_backward_rows<1>(grad + row * H, x12 + row * 2 * H, H, dx12 + row * 2 * H, sums);
}

#define INSTANTIATE(X)                                                     \
  template void swiglu(const X*, int64_t, int64_t, X*);                    \
  template void swiglu_backward(const X*, const X*, int64_t, int64_t, X*); \
  template void swiglu_backward_with_sums(X*, const X*, int64_t, int64_t, X*, double*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(fp16)

}  // namespace CPU_TARGET
