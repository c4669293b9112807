#include "residual/cpu_kernels.h"

#include <math.h>

#include "common/simd.h"

namespace CPU_TARGET {

ALWAYS_INLINE int64_t row_of(const int32_t* rows, int64_t i) { return rows ? rows[i] : i; }

// A sum in double, in registers.
template <class A>
struct DoubleSum {
  static constexpr int kParts = lanes<A> / lanes<double>;
  vec<double> part[kParts] = {};

  __attribute__((always_inline)) void add(vec<A> v) {
    typename VectorOf<A, kVectorBytes / kParts>::type terms[kParts];
    memcpy(terms, &v, sizeof v);
    for (int i = 0; i < kParts; ++i) part[i] += __builtin_convertvector(terms[i], vec<double>);
  }

  __attribute__((always_inline)) double total() const {
    vec<double> sum = part[0];
    for (int i = 1; i < kParts; ++i) sum += part[i];
    double lane[lanes<double>];
    store(lane, sum);
    for (int n = lanes<double> / 2; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
    return lane[0];
  }
};

// sum_c term(c) of a row, in double: four vectors are added in A before they are widened. The lanes of a term past the
// end of the row must be 0.
template <class A, class Term>
ALWAYS_INLINE double sum_over_row(int64_t C, Term term) {
  DoubleSum<A> sum;
  int64_t c = 0;
  for (; c + 4 * lanes<A> <= C; c += 4 * lanes<A>) {
    vec<A> v[4];
    for (int i = 0; i < 4; ++i) v[i] = term(c + i * lanes<A>, Whole{});
    sum.add((v[0] + v[1]) + (v[2] + v[3]));
  }
  for_each_vector<A>(c, C, [&](int64_t k, auto part) { sum.add(term(k, part)); });
  return sum.total();
}

template <class X>
ALWAYS_INLINE void copy_rows(const X* from, X* to, int64_t elements) {
  memcpy(to, from, elements * sizeof(X));
}

template <class X, class H>
void gather_norm(const GatherNorm<X, H>& args, int64_t begin, int64_t end) {
  using A = accumulate_t<X>;
  const int64_t C = args.C;
  for (int64_t i = begin; i < end; ++i) {
    const X* x = args.x + row_of(args.rows, i) * C;
    H* h = args.h + i * C;
    const A mean = sum_over_row<A>(C, [&](int64_t c, auto part) { return load(x + c, part); }) / C;
    // The squares are those of x - mean, so a mean far from 0 does not hurt the precision of the variance.
    const double squares = sum_over_row<A>(C, [&](int64_t c, auto part) {
      const vec<A> centred = zero_outside(load(x + c, part) - mean, part);
      return centred * centred;
    });
    const A rstd = 1 / sqrt(squares / C + args.eps);
    for_each_vector<A>(0, C, [&](int64_t c, auto part) {
      const vec<A> normed = (load(x + c, part) - mean) * rstd;
      store(h + c, normed * load(args.weight + c, part) + load(args.bias + c, part), part);
    });
    args.mean[i] = mean;
    args.rstd[i] = rstd;
  }
}

// The normalised token, from the token ...
template <class X, class A>
struct FromToken {
  const X* x;
  A mean, rstd;

  template <class WholeOrPart>
  __attribute__((always_inline)) vec<A> operator()(int64_t c, WholeOrPart part) const {
    return (load(x + c, part) - mean) * rstd;
  }
};

// ... or from the result of the norm.
template <class H, class A>
struct FromResult {
  const H* h;
  const A *bias, *inverse_weight;

  template <class WholeOrPart>
  __attribute__((always_inline)) vec<A> operator()(int64_t c, WholeOrPart part) const {
    return (load(h + c, part) - load(bias + c, part)) * load(inverse_weight + c, part);
  }
};

// The kept tokens [i, i + N); normed_of(i) is a FromToken or a FromResult.
//   dx = grad_x + (through - mean(through) - normed * mean(through * normed)) * rstd,  through = grad_h * weight
template <int N, class X, class H, class NormedOf>
ALWAYS_INLINE void norm_backward_rows(const GatherNormBackward<X, H>& args, int64_t i, NormedOf normed_of,
                                      double* dweight, double* dbias) {
  using A = accumulate_t<X>;
  const int64_t C = args.C;
  decltype(normed_of(i)) normed[N];
  const H* grad_h[N];
  int64_t start[N];
  A rstd[N], shift[N], slope[N];
  for (int n = 0; n < N; ++n) {
    const H* grad = grad_h[n] = args.grad_h + (i + n) * C;
    const auto normed_n = normed[n] = normed_of(i + n);
    start[n] = row_of(args.rows, i + n) * C;
    rstd[n] = args.rstd[i + n];
    const auto through = [&](int64_t c, auto part) { return load(grad + c, part) * load(args.weight + c, part); };
    shift[n] = sum_over_row<A>(C, through) / C;
    slope[n] = sum_over_row<A>(C, [&](int64_t c, auto part) { return through(c, part) * normed_n(c, part); }) / C;
  }
  for_each_vector<A>(0, C, [&](int64_t c, auto part) {
    const vec<A> weight = load(args.weight + c, part);
    vec<A> grads[N], products[N];
    for (int n = 0; n < N; ++n) {
      const vec<A> grad = load(grad_h[n] + c, part), normed_c = normed[n](c, part);
      // Rounded as in the sum above: otherwise a difference of 0 would become a rounding error times rstd.
      const vec<A> dx = (rounded(grad * weight) - shift[n]) - normed_c * slope[n];
      store(args.dx + start[n] + c, dx * rstd[n] + load(args.grad_x + start[n] + c, part), part);
      grads[n] = grad;
      products[n] = grad * normed_c;
    }
    add_to<N, A>(dweight + c, products, part);
    add_to<N, A>(dbias + c, grads, part);
  });
}

template <class X, class H, class NormedOf>
ALWAYS_INLINE void norm_backward_tokens(const GatherNormBackward<X, H>& args, int64_t begin, int64_t end,
                                        int64_t first, int64_t last, NormedOf normed_of, double* dweight,
                                        double* dbias) {
  const auto pass_until = [&](int64_t row) {  // the dropped tokens before a kept one
    if (begin < row) copy_rows(args.grad_x + begin * args.C, args.dx + begin * args.C, (row - begin) * args.C);
    begin = row;
  };
  const auto pass_kept = [&](int64_t i) {
    pass_until(row_of(args.rows, i));
    ++begin;
  };
  int64_t i = first;
  for (; i + kRows <= last; i += kRows) {
    for (int n = 0; n < kRows; ++n) pass_kept(i + n);
    norm_backward_rows<kRows>(args, i, normed_of, dweight, dbias);
  }
  for (; i < last; ++i) {
    pass_kept(i);
    norm_backward_rows<1>(args, i, normed_of, dweight, dbias);
  }
  pass_until(end);
}

template <class X, class H>
void gather_norm_backward(const GatherNormBackward<X, H>& args, int64_t begin, int64_t end, int64_t first,
                          int64_t last, double* dweight, double* dbias) {
  using A = accumulate_t<X>;
  if (args.x) {
    const auto from_token = [&](int64_t i) {
      return FromToken<X, A>{args.x + row_of(args.rows, i) * args.C, args.mean[i], args.rstd[i]};
    };
    norm_backward_tokens(args, begin, end, first, last, from_token, dweight, dbias);
  } else {
    const auto from_result = [&](int64_t i) {
      return FromResult<H, A>{args.h + i * args.C, args.bias, args.inverse_weight};
    };
    norm_backward_tokens(args, begin, end, first, last, from_result, dweight, dbias);
  }
}

// y = x + scale * gamma * (residual + bias), for the kept token i, which is in this row of x.
template <class X, class H>
ALWAYS_INLINE void add_residual(const Scatter<X, H>& args, int64_t row, int64_t i) {
  using A = accumulate_t<X>;
  const X* x = args.x + row * args.C;
  const H* residual = args.residual + i * args.C;
  X* y = args.y + row * args.C;
  const A scale = args.scale ? args.scale[i] : A(1);
  for_each_vector<A>(0, args.C, [&](int64_t c, auto part) {
    const vec<A> r = (load(residual + c, part) + load(args.bias + c, part)) * load(args.gamma + c, part);
    store(y + c, r * scale + load(x + c, part), part);
  });
}

template <class X, class H>
void scatter_dense(const Scatter<X, H>& args, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t i = row_of(args.position, token);
    if (i < 0) {
      copy_rows(args.x + token * args.C, args.y + token * args.C, args.C);
    } else {
      add_residual(args, token, i);
    }
  }
}

template <class X, class H>
void scatter_kept(const Scatter<X, H>& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) add_residual(args, row_of(args.rows, i), i);
}

template <int N, bool with_residual, class X, class H>
ALWAYS_INLINE void scatter_backward_rows(const ScatterBackward<X, H>& args, int64_t i, double* dgamma,
                                         double* dbias) {
  using A = accumulate_t<X>;
  const int64_t C = args.C;
  const X* grad[N];
  A scale[N];
  for (int n = 0; n < N; ++n) {
    grad[n] = args.grad + row_of(args.rows, i + n) * C;
    scale[n] = args.scale ? args.scale[i + n] : A(1);
  }
  for_each_vector<A>(0, C, [&](int64_t c, auto part) {
    const vec<A> gamma = load(args.gamma + c, part), bias = load(args.bias + c, part);
    vec<A> dresidual[N], products[N];
    for (int n = 0; n < N; ++n) {
      const vec<A> kept = load(grad[n] + c, part) * scale[n];
      dresidual[n] = kept * gamma;
      if constexpr (with_residual) products[n] = kept * (load(args.residual + (i + n) * C + c, part) + bias);
      store(args.dresidual + (i + n) * C + c, dresidual[n], part);
    }
    if constexpr (with_residual) add_to<N, A>(dgamma + c, products, part);
    add_to<N, A>(dbias + c, dresidual, part);
  });
}

template <bool with_residual, class X, class H>
ALWAYS_INLINE void scatter_backward_range(const ScatterBackward<X, H>& args, int64_t begin, int64_t end,
                                          double* dgamma, double* dbias) {
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) scatter_backward_rows<kRows, with_residual>(args, i, dgamma, dbias);
  for (; i < end; ++i) scatter_backward_rows<1, with_residual>(args, i, dgamma, dbias);
}

template <class X, class H>
void scatter_backward(const ScatterBackward<X, H>& args, int64_t begin, int64_t end, double* dgamma, double* dbias) {
  if (args.residual) {
    scatter_backward_range<true>(args, begin, end, dgamma, dbias);
  } else {
    scatter_backward_range<false>(args, begin, end, dgamma, dbias);
  }
}

#define INSTANTIATE(X, H)                                                                                     \
  template void gather_norm(const GatherNorm<X, H>&, int64_t, int64_t);                                       \
  template void gather_norm_backward(const GatherNormBackward<X, H>&, int64_t, int64_t, int64_t, int64_t, double*, \
                                     double*);                                                                \
  template void scatter_dense(const Scatter<X, H>&, int64_t, int64_t);                                        \
  template void scatter_kept(const Scatter<X, H>&, int64_t, int64_t);                                         \
  template void scatter_backward(const ScatterBackward<X, H>&, int64_t, int64_t, double*, double*);
FOR_EACH_PAIR(INSTANTIATE)

}  // namespace CPU_TARGET
