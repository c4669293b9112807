// The serial parts of the Sinkhorn-Knopp step, the work of one thread: cpu_kernels.cpp, compiled for every CPU target.
//
// x [B, K] are logits of type X, contiguous, at temperature T; A = accumulate_t<X>; bias [K]; z = x / T + bias.
#pragma once

#include "common/cpu_target.h"
#include "common/dtypes.h"

// The shift and scale that turn a row of z into its softmax: p = exp(z - shift) * inverse_sum.
template <class A>
struct RowScale {
  A shift, inverse_sum;
};

constexpr int64_t kMaxTileWidth = 1024;

// Memory for one thread's tile of `width` columns, at most kMaxTileWidth, and all rows. Aligned to cache lines.
template <class A>
struct Scratch {
  int64_t width;
  A* p;          // [B, width]
  A* lane_sums;  // [B, lanes]: sums over columns, before the lanes of a vector are added; 64 bytes per row
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
  /* One iteration, for the columns in [begin, end): bias -= log sum_b p_bk. row_sums[b] is then the sum of the p_bk  \
     of these columns with their new bias, and the sum over all columns divides the row's inverse_sum; or it is NaN,  \
     where no sum can. The first iteration does not read the bias; its rows are {0, 1}: p = exp(z). */               \
  template <class X, class A = accumulate_t<X>>                                                                      \
  void iterate(const X* x, int64_t B, int64_t K, double T, bool first, const RowScale<A>* rows, int64_t begin,       \
               int64_t end, const Scratch<A>& scratch, A* bias, double* row_sums);                                   \
  /* The scale of one row x [K]. */                                                                                  \
  template <class X, class A = accumulate_t<X>>                                                                      \
  RowScale<A> row_scale(const X* x, int64_t K, double T, const A* bias);                                          \
  /* out[k] = p_k, for one row x [K]. */                                                                             \
  template <class X, class A = accumulate_t<X>>                                                                      \
  void assign(const X* x, int64_t K, double T, const A* bias, A* out);                                           \
  }
FOR_EACH_CPU_TARGET(DECLARE)
#undef DECLARE
