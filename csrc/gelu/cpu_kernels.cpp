#include "gelu/cpu_kernels.h"

#include "common/sigmoid.h"

namespace CPU_TARGET {

template <class A>
struct Gelu {
  vec<A> value, slope;
};

// For a >= 0, exp(a^2 / 2) Phi(-a) = t P(y) with t = 1 / (a + 4) and y = (a - 4) t, where Phi is the normal distribution
// function. P is interpolated in Chebyshev's points over all a, with an error of 2e-9 in float and 1e-16 in double.
template <class A>
struct TailConstants;

template <>
struct TailConstants<float> {
  static constexpr float kPolynomial[] = {0x1.82b4bcp-1f,  -0x1.373e3ap-1f, 0x1.8c6dbep-2f, -0x1.7dff54p-3f,
                                          0x1.eec4f4p-5f,  -0x1.edfde8p-8f, -0x1.c81fe6p-9f, 0x1.a93544p-10f,
                                          0x1.184a9ep-13f, -0x1.c4174ap-13f, -0x1.d0af12p-20f, 0x1.63643ap-16f};
};

template <>
struct TailConstants<double> {
  static constexpr double kPolynomial[] = {
      0x1.82b4bb8c94dcdp-1,   -0x1.373e3a893c28cp-1,  0x1.8c6dbf2cfc388p-2,   -0x1.7dff2bff68080p-3,
      0x1.eec4cc3e39776p-5,   -0x1.ee2761054501fp-8,  -0x1.c81719be71757p-9,  0x1.ab825feed60c0p-10,
      0x1.17a4a08efb4f6p-13,  -0x1.e4a43156c4564p-13, -0x1.000b3fd28b8a4p-19, 0x1.26d18d992c1ccp-15,
      0x1.7fa62c0d145c8p-21,  -0x1.8d6480ccf6ccap-18, -0x1.4f852d0cd4c1ep-21, 0x1.1316b229f3154p-20,
      0x1.1c4173fea8cfep-22,  -0x1.571caa0900ce5p-23, -0x1.525f7cf095528p-24, 0x1.3292d28468146p-26,
      0x1.14091d7a7c750p-26,  -0x1.42e7f2a5e9142p-31, -0x1.d02cb8b1aece5p-30, -0x1.07d58223a74e6p-33};
};

// z Phi(z), and Phi(z) + z phi(z) with phi(z) = exp(-z^2 / 2) / sqrt(2 pi), from one exponential. The smaller of Phi(z)
// and Phi(-z) comes from it directly, so the tail is not a difference of numbers near 1.
template <class A>
ALWAYS_INLINE Gelu<A> gelu_erf(vec<A> z) {
  using C = TailConstants<A>;
  constexpr int degree = sizeof C::kPolynomial / sizeof(A) - 1;
  const vec<A> a = z > 0 ? z : -z, e = exp<A>(z * z * A(-0.5));
  const vec<A> t = 1 / (a + 4), y = 1 - 8 * t;
  vec<A> polynomial = broadcast(C::kPolynomial[degree]);
#pragma GCC unroll 24
  for (int i = degree - 1; i >= 0; --i) polynomial = polynomial * y + C::kPolynomial[i];
  const vec<A> tail = e * (t * polynomial), cdf = z > 0 ? 1 - tail : tail;
  return {z * cdf, cdf + z * (e * A(0.3989422804014327))};
}

// z s and s + z s (1 - s) 2 u' with s = 1 / (1 + exp(-2 u)) and u = sqrt(2 / pi) (z + 0.044715 z^3): the same as
// z (1 + tanh(u)) / 2.
template <class A>
ALWAYS_INLINE Gelu<A> gelu_tanh(vec<A> z) {
  constexpr A k = 1.5957691216057308;  // 2 sqrt(2 / pi)
  const vec<A> square = z * z;
  const Sigmoid<A> s = sigmoid<A>(z * (k + A(0.044715) * k * square));
  const vec<A> value = z * s.value;
  return {value, s.value + value * (s.rest * (k + A(3 * 0.044715) * k * square))};
}

template <int N, bool tanh, class X>
ALWAYS_INLINE void gelu_backward_rows(X* grad, const X* z, int64_t H, X* h, double* sums) {
  using A = accumulate_t<X>;
  for_each_vector<A>(0, H, [&](int64_t c, auto part) {
    vec<A> dz[N] = {};
    for (int n = 0; n < N; ++n) {
      const int64_t i = n * H + c;
      Gelu<A> gelu;
      if constexpr (tanh) {
        gelu = gelu_tanh<A>(load(z + i, part));
      } else {
        gelu = gelu_erf<A>(load(z + i, part));
      }
      dz[n] = load(grad + i, part) * gelu.slope;
      store(h + i, gelu.value, part);
      store(grad + i, dz[n], part);
    }
    add_to<N, A>(sums + c, dz, part);
  });
}

template <class X, bool tanh>
void gelu_backward(X* grad, const X* z, int64_t rows, int64_t H, X* h, double* sums) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    gelu_backward_rows<kRows, tanh>(grad + row * H, z + row * H, H, h + row * H, sums);
  for (; row < rows; ++row) gelu_backward_rows<1, tanh>(grad + row * H, z + row * H, H, h + row * H, sums);
}

#define INSTANTIATE(X)                                                                      \
  template void gelu_backward<X, false>(X*, const X*, int64_t, int64_t, X*, double*);       \
  template void gelu_backward<X, true>(X*, const X*, int64_t, int64_t, X*, double*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(fp16)

}  // namespace CPU_TARGET
