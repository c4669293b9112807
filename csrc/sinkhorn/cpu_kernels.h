// The serial parts of the Sinkhorn-Knopp step, one thread's share each: cpu_kernels.cpp, compiled for every CPU target.
//
// x [B, K] are logits of type X, contiguous, at temperature T; A = accumulate_t<X>; bias [K]; z = x / T + bias.
#pragma once

#include "common/cpu_target.h"
#include "common/dtypes.h"

// What turns a row of z into its softmax: p = exp(z - shift) * inverse_sum.
template <class A>
struct RowScale {
  A shift, inverse_sum;
};

#define DECLARE(target)                                                                                              \
  namespace target {                                                                                                 \
  /* out[k] = log sum_b exp(x_bk / T), for k in [begin, end). */                                                     \
  template <class X, class A = accumulate_t<X>>                                                                      \
  void column_logsumexp(const X* x, int64_t B, int64_t K, double T, int64_t begin, int64_t end, A* out);          \
  /* out[k] = sum_b p_bk, for k in [begin, end). */                                                                  \
  template <class X, class A = accumulate_t<X>>                                                                      \
  void column_mass(const X* x, int64_t B, int64_t K, double T, const A* bias, const RowScale<A>* rows,            \
                   int64_t begin, int64_t end, A* out);                                                              \
  /* The scale of one row x [K]. */                                                                                  \
  template <class X, class A = accumulate_t<X>>                                                                      \
  RowScale<A> row_scale(const X* x, int64_t K, double T, const A* bias);                                          \
  /* out[k] = p_k, for one row x [K]. */                                                                             \
  template <class X, class A = accumulate_t<X>>                                                                      \
  void assign(const X* x, int64_t K, double T, const A* bias, A* out);                                           \
  }
FOR_EACH_CPU_TARGET(DECLARE)
#undef DECLARE
