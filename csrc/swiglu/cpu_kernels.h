// The serial parts of SwiGLU, the work of one thread: cpu_kernels.cpp, compiled for every CPU target.
//
// Some rows of x12 [rows, 2H], the gate x1 before the value x2, and of grad and y [rows, H]; all of type X, contiguous.
#pragma once

#include "common/cpu_target.h"
#include "common/dtypes.h"

#define DECLARE(target)                                                                                              \
  namespace target {                                                                                                 \
  /* y = silu(x1) x2. */                                                                                             \
  template <class X>                                                                                                 \
  void swiglu(const X* x12, int64_t rows, int64_t H, X* y);                                                          \
  /* dx12 [rows, 2H], given the gradient of y. */                                                                    \
  template <class X>                                                                                                 \
  void swiglu_backward(const X* grad, const X* x12, int64_t rows, int64_t H, X* dx12);                               \
  /* The same, with y in place of grad; adds the sums of dx12 over the rows to sums [2H]. */                          \
  template <class X>                                                                                                 \
  void swiglu_backward_with_sums(X* grad, const X* x12, int64_t rows, int64_t H, X* dx12, double* sums);             \
  }
FOR_EACH_CPU_TARGET(DECLARE)
#undef DECLARE
