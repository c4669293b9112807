#include "cross_entropy/cpu_kernels.h"

#include <math.h>

#include "common/exp.h"

namespace CPU_TARGET {

// Number of vectors that are summed in A before the sum is widened to double.
constexpr int kStep = 8;

// z, and -inf past the end of a row. Every pass must round z in the same way, so the loads come first: all passes then
// fuse the multiplication and the addition.
template <class X, class A, class WholeOrPart>
ALWAYS_INLINE vec<A> biased(const X* x, A scale, const A* bias, WholeOrPart part) {
  const vec<A> x_k = load(x, part), bias_k = load(bias, part, A(-INFINITY));
  return x_k * scale + bias_k;
}

// Calls body(k, part) for the vectors of [0, n), and after() after every kStep vectors and at the end.
template <class A, class Body, class After>
ALWAYS_INLINE void in_steps(int64_t n, Body body, After after) {
  for (int64_t k = 0; k < n; k += kStep * lanes<A>) {
    for_each_vector<A>(k, k + kStep * lanes<A> < n ? k + kStep * lanes<A> : n, body);
    after();
  }
}

template <class A>
ALWAYS_INLINE void raise(vec<A>& max, vec<A> v, Whole) {
  max = maximum(v, max);
}

template <class A>
ALWAYS_INLINE void raise(vec<A>& max, vec<A> v, Part part) {
  for (int lane = 0; lane < part.n; ++lane) max[lane] = v[lane] > max[lane] ? v[lane] : max[lane];
}

template <class X, class A>
A largest(const X* x, int64_t n) {
  vec<A> max = broadcast(A(-INFINITY));
  for_each_vector<A>(0, n, [&](int64_t k, auto part) { raise<A>(max, load(x + k, part), part); });
  return largest_lane<A>(max);
}

template <class X, class A>
A largest_biased(const X* x, int64_t n, A scale, const A* bias) {
  vec<A> max = broadcast(A(-INFINITY));
  for_each_vector<A>(0, n, [&](int64_t k, auto part) { max = maximum(biased(x + k, scale, bias + k, part), max); });
  return largest_lane<A>(max);
}

template <class X, class A>
double teacher_exponentials(const X* x, int64_t n, A scale, const A* bias, A shift, A* e) {
  wide<A> sum = {};
  vec<A> step = {};
  in_steps<A>(
      n,
      [&](int64_t k, auto part) {
        const vec<A> e_k = exp<A>(biased(x + k, scale, bias + k, part) - shift);
        store(e + k, e_k, part);
        step += e_k;
      },
      [&] {
        sum += widen<A>(step);
        step = vec<A>{};
      });
  return sum_of_lanes<A>(sum);
}

template <class X, class A>
TileSums student_sums(const X* x, int64_t n, A scale, A shift, const A* e) {
  wide<A> exponentials = {}, products = {};
  vec<A> step_exponentials = {}, step_products = {};
  in_steps<A>(
      n,
      [&](int64_t k, auto part) {
        const vec<A> distance = zero_outside(shift - load(x + k, part), part);
        step_exponentials += zero_outside(exp<A>(distance * -scale), part);
        step_products += load(e + k, part, A(0)) * distance;
      },
      [&] {
        exponentials += widen<A>(step_exponentials);
        products += widen<A>(step_products);
        step_exponentials = step_products = vec<A>{};
      });
  return {sum_of_lanes<A>(exponentials), sum_of_lanes<A>(products)};
}

template <class X, class A>
double student_products(const X* x, int64_t n, A shift, const A* e) {
  wide<A> products = {};
  vec<A> step = {};
  in_steps<A>(
      n,
      [&](int64_t k, auto part) {
        step += load(e + k, part, A(0)) * zero_outside(shift - load(x + k, part), part);
      },
      [&] {
        products += widen<A>(step);
        step = vec<A>{};
      });
  return sum_of_lanes<A>(products);
}

template <class X, class A>
void targets(const X* x, int64_t n, A scale, const A* bias, A shift, A factor, bool add, A* q) {
  for_each_vector<A>(0, n, [&](int64_t k, auto part) {
    const vec<A> q_k = exp<A>(biased(x + k, scale, bias + k, part) - shift) * factor;
    store(q + k, add ? load(q + k, part) + q_k : q_k, part);
  });
}

template <class X, class A>
void gradient(const X* x, int64_t n, A scale, A shift, A student_factor, A target_factor, const A* q, X* dx) {
  for_each_vector<A>(0, n, [&](int64_t k, auto part) {
    const vec<A> p = exp<A>((load(x + k, part) - shift) * scale);
    store(dx + k, p * student_factor - load(q + k, part) * target_factor, part);
  });
}

#define INSTANTIATE(X, A)                                                                   \
  template A largest(const X*, int64_t);                                                    \
  template A largest_biased(const X*, int64_t, A, const A*);                                \
  template double teacher_exponentials(const X*, int64_t, A, const A*, A, A*);              \
  template TileSums student_sums(const X*, int64_t, A, A, const A*);                        \
  template double student_products(const X*, int64_t, A, const A*);                         \
  template void targets(const X*, int64_t, A, const A*, A, A, bool, A*);                    \
  template void gradient(const X*, int64_t, A, A, A, A, const A*, X*);
INSTANTIATE(double, double)
INSTANTIATE(float, float)
INSTANTIATE(bf16, float)
INSTANTIATE(fp16, float)

}  // namespace CPU_TARGET
