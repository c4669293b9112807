// The serial parts of the cross-entropy of prototypes, for one row: cpu_kernels.cpp, compiled for every CPU target.
//
// A row has c columns: teacher logits t of type X, with bias [c]; student logits s of type X; rows of targets q [M, c]
// in A = accumulate_t<X>. Q is the sum of the target rows in an index [J]. T is the teacher's or the student's
// temperature.
#pragma once

#include "common/cpu_target.h"
#include "common/dtypes.h"

// The norm that turns z = t / T + bias into targets: q = exp(z - maximum) / total.
template <class A>
struct TargetNorm {
  A maximum, total;
};

// The state of a student row after some columns: the largest s, total = sum exp((s - maximum) / T), the mass sum Q, and
// cross = sum Q (s - maximum).
template <class A>
struct RowState {
  A maximum, total, mass, cross;
};

#define DECLARE(target)                                                                                              \
  namespace target {                                                                                                 \
  template <class X, class A = accumulate_t<X>>                                                                      \
  TargetNorm<A> target_norm(const X* t, const A* bias, int64_t c, double T);                                         \
  /* q[k], given the norm of the whole row. The row that follows, elsewhere in memory, is asked for meanwhile. */    \
  template <class X, class A = accumulate_t<X>>                                                                      \
  void targets(const X* t, const A* bias, TargetNorm<A> norm, int64_t c, double T, const X* next, A* q);             \
  /* The state with c more columns. */                                                                               \
  template <class X, class A = accumulate_t<X>>                                                                      \
  RowState<A> accumulate(RowState<A> state, const X* s, const A* q, const int64_t* index, int64_t J, int64_t c,      \
                         double T);                                                                                  \
  /* s[k] = scale (mass p_k - Q_k), with p = softmax(s / T), given the state of all columns. */                      \
  template <class X, class A = accumulate_t<X>>                                                                      \
  void gradient(RowState<A> state, const A* q, const int64_t* index, int64_t J, A scale, int64_t c, double T, X* s); \
  }
FOR_EACH_CPU_TARGET(DECLARE)
#undef DECLARE
