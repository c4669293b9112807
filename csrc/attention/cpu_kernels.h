// Attention within one head of one sequence, the work of one thread: cpu_kernels.cpp, compiled for every CPU target.
#pragma once

#include "common/cpu_target.h"
#include "common/dtypes.h"

// N tokens of D values of type X; token i at data + i * stride.
template <class X>
struct Tokens {
  X* data;
  int64_t stride;
};

// One head of one sequence.
template <class X>
struct Head {
  Tokens<const X> q, k, v;
};

struct HeadShape {
  int64_t N, D;
  float scale;
};

// Formulas: dinov2_kernels/attention/reference.py. A workspace is aligned to 64 bytes, one per thread.
#define DECLARE(target)                                                                                               \
  namespace target {                                                                                                  \
  /* Bytes of a workspace. */                                                                                         \
  template <class X>                                                                                                  \
  int64_t attention_forward_workspace(int64_t N, int64_t D);                                                          \
  template <class X>                                                                                                  \
  int64_t attention_backward_workspace(int64_t N, int64_t D);                                                         \
  /* out_i and lse[i] of the queries i in [begin, end). The head `next` is asked for ahead of its own call. */         \
  template <class X>                                                                                                  \
  void attention_forward(HeadShape shape, Head<X> head, Head<X> next, int64_t begin, int64_t end, Tokens<X> out,      \
                         float* lse, void* workspace);                                                                \
  template <class X>                                                                                                  \
  void attention_backward(HeadShape shape, Tokens<const X> grad, Tokens<const X> q, Tokens<const X> k,                \
                          Tokens<const X> v, Tokens<const X> out, const float* lse, Tokens<X> dq, Tokens<X> dk,       \
                          Tokens<X> dv, void* workspace);                                                             \
  }
FOR_EACH_CPU_TARGET(DECLARE)
#undef DECLARE
