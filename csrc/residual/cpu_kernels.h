// The serial parts of a residual connection, the work of one thread: cpu_kernels.cpp, compiled for every CPU target.
//
// x [T, C] are tokens of type X; rows [t] are the kept ones, in ascending order; h and residual [t, C] have type H.
// Everything is contiguous. A = accumulate_t<X> = accumulate_t<H> is the type of statistics [t] and parameters [C].
// If rows and position are null, every token is kept; if scale is null, it is 1.
#pragma once

#include "common/cpu_target.h"
#include "common/dtypes.h"

template <class X, class H, class A = accumulate_t<X>>
struct GatherNorm {
  const X* x;
  const int32_t* rows;
  const A *weight, *bias;
  double eps;
  int64_t C;
  H* h;            // written, like the next two
  A *mean, *rstd;  // for every kept token
};

template <class X, class H, class A = accumulate_t<X>>
struct GatherNormBackward {
  const H* grad_h;
  const X *grad_x, *x;  // x null: the normalised tokens are recovered from h
  const H* h;
  const int32_t* rows;
  const A *mean, *rstd, *weight, *bias, *inverse_weight;  // 0 for a weight of 0; used with h, as is the bias
  int64_t C;
  X* dx;  // written
};

template <class X, class H, class A = accumulate_t<X>>
struct Scatter {
  const X* x;
  const H* residual;
  const int32_t *rows, *position;  // scatter_dense uses position [T], scatter_kept uses rows
  const A *scale, *gamma, *bias;
  int64_t C;
  X* y;  // written; x itself for scatter_kept
};

template <class X, class H, class A = accumulate_t<X>>
struct ScatterBackward {
  const X* grad;
  const H* residual;  // null: no gradient of gamma
  const int32_t* rows;
  const A *scale, *gamma, *bias;
  int64_t C;
  H* dresidual;  // written
};

#define DECLARE(target)                                                                                              \
  namespace target {                                                                                                 \
  /* The kept tokens [begin, end). */                                                                                \
  template <class X, class H>                                                                                        \
  void gather_norm(const GatherNorm<X, H>& args, int64_t begin, int64_t end);                                        \
  /* dx of the tokens [begin, end), among them the kept ones [first, last), whose share is added to the gradients of \
     weight and bias [C]. */                                                                                         \
  template <class X, class H>                                                                                        \
  void gather_norm_backward(const GatherNormBackward<X, H>& args, int64_t begin, int64_t end, int64_t first,         \
                            int64_t last, double* dweight, double* dbias);                                           \
  /* The tokens [begin, end) of x, kept or not. */                                                                   \
  template <class X, class H>                                                                                        \
  void scatter_dense(const Scatter<X, H>& args, int64_t begin, int64_t end);                                         \
  /* The kept tokens [begin, end) alone. */                                                                          \
  template <class X, class H>                                                                                        \
  void scatter_kept(const Scatter<X, H>& args, int64_t begin, int64_t end);                                          \
  /* The kept tokens [begin, end), whose share is added to the gradients of gamma and bias [C]. */                   \
  template <class X, class H>                                                                                        \
  void scatter_backward(const ScatterBackward<X, H>& args, int64_t begin, int64_t end, double* dgamma,               \
                        double* dbias);                                                                              \
  }
FOR_EACH_CPU_TARGET(DECLARE)
#undef DECLARE

// The pairs (X, H) that are compiled.
#define FOR_EACH_PAIR(APPLY)                                     \
  APPLY(double, double)                                          \
  APPLY(float, float) APPLY(float, bf16) APPLY(float, fp16)      \
  APPLY(bf16, float) APPLY(bf16, bf16) APPLY(bf16, fp16)         \
  APPLY(fp16, float) APPLY(fp16, bf16) APPLY(fp16, fp16)
