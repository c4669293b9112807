// The serial parts of KoLeo, the work of one thread: cpu_kernels.cpp, compiled for every CPU target.
//
// Rows x hold D values of type X, A = accumulate_t<X>; a row over its divisor has unit length. Unit rows are packed in
// panels of panel_rows() of them, transposed: value d of row i of a panel at [d * panel_rows() + i].
#pragma once

#include <stdint.h>

#include "common/cpu_target.h"
#include "common/dtypes.h"

// A panel of unit rows; the first row has number `first`, and the rest of the panel holds zeros.
template <class A>
struct Panel {
  const A* unit;
  int64_t first, rows;
  int32_t low, high;  // range of the batches of its rows; -1 for the zeros
};

// The k candidates nearest to each of many rows, nearest first: slot t of row i at [t * rows + i].
template <class A>
struct Nearest {
  A* cosine;       // -inf: no candidate yet
  int64_t* index;  // their numbers
  int64_t rows, k;
};

#define DECLARE(target)                                                                                          \
  namespace target {                                                                                             \
  int64_t panel_rows();                                                                                          \
  template <class X, class A = accumulate_t<X>>                                                                  \
  A length(const X* x, int64_t D);                                                                               \
  /* n rows as a panel. */                                                                                       \
  template <class X, class A = accumulate_t<X>>                                                                  \
  void pack_panel(const X* x, const A* divisor, int64_t n, int64_t D, A* panel);                                  \
  /* Makes the rows of one panel candidates of those of another, where both belong to the same batch [N]. Row n    \
     stands at n - base of its neighbours. Where there is no `of_right`, those of the right rows are not wanted;    \
     rows of a panel with itself meet once. */                                                                   \
  template <class A>                                                                                             \
  void search(const Panel<A>& left, const Panel<A>& right, int64_t D, const int32_t* batch, int64_t base,        \
              const Nearest<A>& of_left, const Nearest<A>* of_right);                                            \
  /* Adds a candidate of row i; of equally near ones, the lowest number comes first. */                          \
  template <class A>                                                                                             \
  void insert(const Nearest<A>& nearest, int64_t i, A cosine, int64_t index);                                    \
  /* ||a - b + eps|| of unit rows. */                                                                            \
  template <class X, class A = accumulate_t<X>>                                                                  \
  A distance(const X* a, A a_divisor, const X* b, A b_divisor, int64_t D, A eps);                                  \
  /* g [D] += scale * (a - b + eps) of unit rows. */                                                             \
  template <class X, class A = accumulate_t<X>>                                                                  \
  void add_difference(const X* a, A a_divisor, const X* b, A b_divisor, int64_t D, A eps, A scale, A* g);          \
  /* The gradient of a row whose unit row has gradient g. */                                                     \
  template <class X, class A = accumulate_t<X>>                                                                  \
  void normalize_backward(const X* x, A divisor, const A* g, int64_t D, X* dx);                                   \
  }
FOR_EACH_CPU_TARGET(DECLARE)
#undef DECLARE
