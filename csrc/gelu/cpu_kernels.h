// The serial part of GELU's backward pass, the work of one thread: cpu_kernels.cpp, compiled for every CPU target.
#pragma once

#include "common/cpu_target.h"
#include "common/dtypes.h"

#define DECLARE(target)                                                                                              \
  namespace target {                                                                                                 \
  /* Some rows of grad, z and h [rows, H], contiguous. Puts gelu(z) into h, and the gradient of z into grad in place \
     of that of h; adds the latter's sums over the rows to sums [H]. */                                              \
  template <class X, bool tanh>                                                                                      \
  void gelu_backward(X* grad, const X* z, int64_t rows, int64_t H, X* h, double* sums);                              \
  }
FOR_EACH_CPU_TARGET(DECLARE)
#undef DECLARE
