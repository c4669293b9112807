// The serial parts of soft-target cross-entropy, for one tile of columns. cpu_kernels.cpp is built for every CPU target.
//
// One row has n <= kTileColumns logits x of type X, of the student or the teacher; A = accumulate_t<X>; scale is 1 / T.
// Teacher logits have a bias [n], and z = x * scale + bias.
#pragma once

#include "common/cpu_target.h"
#include "common/dtypes.h"

constexpr int64_t kTileColumns = 2048;  // exponentials of a tile, and a tile of a student, stay in the first-level cache

// sum exp((x - shift) * scale), and sum e * (shift - x).
struct TileSums {
  double exponentials, products;
};

#define DECLARE(target)                                                                                              \
  namespace target {                                                                                                 \
  template <class X, class A = accumulate_t<X>>                                                                      \
  A largest(const X* x, int64_t n);                                                                                  \
  template <class X, class A = accumulate_t<X>>                                                                      \
  A largest_biased(const X* x, int64_t n, A scale, const A* bias);                                                   \
  /* e = exp(z - shift), and their sum. */                                                                           \
  template <class X, class A = accumulate_t<X>>                                                                      \
  double teacher_exponentials(const X* x, int64_t n, A scale, const A* bias, A shift, A* e);                         \
  template <class X, class A = accumulate_t<X>>                                                                      \
  TileSums student_sums(const X* x, int64_t n, A scale, A shift, const A* e);                                        \
  /* Only the second of these sums. */                                                                               \
  template <class X, class A = accumulate_t<X>>                                                                      \
  double student_products(const X* x, int64_t n, A shift, const A* e);                                               \
  /* q = factor * exp(z - shift), or q += the same with `add`. */                                                    \
  template <class X, class A = accumulate_t<X>>                                                                      \
  void targets(const X* x, int64_t n, A scale, const A* bias, A shift, A factor, bool add, A* q);                    \
  /* dx = student_factor * exp((x - shift) * scale) - target_factor * q; dx may be x. */                             \
  template <class X, class A = accumulate_t<X>>                                                                      \
  void gradient(const X* x, int64_t n, A scale, A shift, A student_factor, A target_factor, const A* q, X* dx);      \
  }
FOR_EACH_CPU_TARGET(DECLARE)
#undef DECLARE
