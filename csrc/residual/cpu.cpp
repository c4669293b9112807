// Residual connections on CPU: operators, and how threads share their work. cpu_kernels.cpp has the work of one thread;
// the definition is dinov2_kernels/residual/reference.py.
//
// Every operator is one pass over its tokens; a token is read once from memory and then from the cache. Gradients of
// parameters are sums over tokens; they are the same for every number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/huge_pages.h"
#include "common/sum_over_tokens.h"
#include "residual/cpu_kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

constexpr int64_t kGrain = 1 << 15;  // elements below which a second thread does not pay
constexpr int64_t kAligned = 4;      // rows and positions of a draw start at a multiple of this number

// Number of tokens of C elements that are worth a thread.
int64_t token_grain(int64_t C) { return ceil_div(kGrain, std::max<int64_t>(C, 1)); }

// The two sums [C] to which body(begin, end, first_sum, second_sum) adds.
struct Sums {
  std::vector<double> first, second;  // [C]
};

template <class Body>
Sums two_sums_over_tokens(int64_t tokens, int64_t C, const Body& body) {
  const std::vector<double> total =
      sum_over_tokens(tokens, token_grain(C), 2 * C,
                      [&](int64_t begin, int64_t end, double* sums) { body(begin, end, sums, sums + C); });
  return {{total.begin(), total.begin() + C}, {total.begin() + C, total.end()}};
}

// ---- dtypes

ScalarType accumulation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor to(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// The dtype of the branch's side in kernels for tokens of dtype x: `dtype` itself if that pair is compiled. float64 with
// a narrower dtype is not compiled; it is so rare that a converted copy is enough.
ScalarType computed_dtype(ScalarType dtype, ScalarType x) {
  return accumulation_dtype(dtype) == accumulation_dtype(x) ? dtype : accumulation_dtype(x);
}

Tensor beside(const Tensor& tensor, ScalarType x) { return to(tensor, computed_dtype(tensor.scalar_type(), x)); }

template <class Body>
void dispatch(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double: return body.template operator()<double>();
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::BFloat16: return body.template operator()<bf16>();
    case ScalarType::Half: return body.template operator()<fp16>();
    default: STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16");
  }
}

// Calls body<X, H>() with the C++ types of tokens and of the branch's input or output.
template <class Body>
void dispatch(ScalarType x, ScalarType h, const Body& body) {
  dispatch(x, [&]<class X>() {
    dispatch(h, [&]<class H>() {
      if constexpr (std::is_same_v<accumulate_t<X>, accumulate_t<H>>) body.template operator()<X, H>();
    });
  });
}

template <class X>
const X* pointer(const Tensor& tensor) {
  return static_cast<const X*>(tensor.const_data_ptr());
}

template <class X>
const X* pointer(const OptionalTensor& tensor) {
  return tensor ? pointer<X>(*tensor) : nullptr;
}

// The memory of a new result.
template <class X>
X* written(Tensor& tensor) {
  advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * sizeof(X));
  return static_cast<X*>(tensor.mutable_data_ptr());
}

// A parameter [C] of any dtype in type A; if it is absent, all its values are `fill`.
template <class A>
std::vector<A> parameter(const OptionalTensor& tensor, int64_t C, A fill) {
  if (!tensor) return std::vector<A>(C, fill);
  const Tensor converted = to(*tensor, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
  return {pointer<A>(converted), pointer<A>(converted) + C};
}

template <class A>
Tensor gradient(const Tensor& like, const std::vector<double>& sum) {
  const ScalarType dtype = accumulation_dtype(like.scalar_type());
  Tensor out = torch::stable::new_empty(like, {static_cast<int64_t>(sum.size())}, dtype);
  std::copy(sum.begin(), sum.end(), static_cast<A*>(out.mutable_data_ptr()));
  return out;
}

// ---- operators

// One draw: writes the rows of the kept samples, kept[r] of each run, and the place of each kept token into `place`,
// which holds -1 before.
template <class Key>
void keep_smallest(const Key* key, const std::vector<int64_t>& runs, const int64_t* kept, int32_t* row,
                   int32_t* place) {
  int32_t i = 0, token = 0;
  std::vector<int64_t> sample;
  for (size_t r = 0; 2 * r < runs.size(); ++r) {
    const int64_t count = runs[2 * r], length = runs[2 * r + 1];
    sample.resize(count);
    std::iota(sample.begin(), sample.end(), 0);
    std::nth_element(sample.begin(), sample.begin() + kept[r], sample.end(), [&](int64_t a, int64_t b) {
      return key[a] != key[b] ? key[a] < key[b] : a < b;
    });
    std::sort(sample.begin(), sample.begin() + kept[r]);
    for (int64_t k = 0; k < kept[r]; ++k) {
      for (int64_t n = 0; n < length; ++n) {
        row[i] = token + sample[k] * length + n;
        place[row[i]] = i;
        ++i;
      }
    }
    key += count;
    token += count * length;
  }
}

std::tuple<Tensor, Tensor> residual_kept_rows(const Tensor& keys, std::vector<int64_t> runs,
                                              std::vector<int64_t> kept) {
  const int64_t draws = keys.size(0), samples = keys.size(1), num_runs = runs.size() / 2;
  const auto round_up = [](int64_t numbers) { return ceil_div(numbers, kAligned) * kAligned; };
  int64_t num_tokens = 0, num_rows = 0;
  for (int64_t r = 0; r < num_runs; ++r) num_tokens += runs[2 * r] * runs[2 * r + 1];
  std::vector<int64_t> first_row(draws);
  for (int64_t d = 0; d < draws; ++d) {
    first_row[d] = num_rows = round_up(num_rows);
    for (int64_t r = 0; r < num_runs; ++r) num_rows += kept[d * num_runs + r] * runs[2 * r + 1];
  }
  const int64_t stride = round_up(num_tokens), num_places = (draws - 1) * stride + num_tokens;
  Tensor rows = torch::stable::new_empty(keys, {num_rows}, ScalarType::Int);
  Tensor position = torch::stable::new_empty(keys, {num_places}, ScalarType::Int);
  int32_t* row = static_cast<int32_t*>(rows.mutable_data_ptr());
  int32_t* place = static_cast<int32_t*>(position.mutable_data_ptr());
  std::fill(place, place + num_places, -1);
  for (int64_t d = 1; d < draws; ++d)  // the end of a gap is known, and a draw writes after it
    std::fill(row + std::max<int64_t>(first_row[d] - (kAligned - 1), 0), row + first_row[d], 0);
  const auto draw_all = [&]<class Key>(const Key* key) {
    parallel_for(0, draws, 1, [&](int64_t begin, int64_t end) {
      for (int64_t d = begin; d < end; ++d) {
        keep_smallest(key + d * samples, runs, kept.data() + d * num_runs, row + first_row[d], place + d * stride);
      }
    });
  };
  if (keys.scalar_type() == ScalarType::Float) {  // the usual dtype: converting it would cost more than the rest
    draw_all(pointer<float>(keys));
  } else {
    const Tensor wide_keys = to(keys, ScalarType::Double);
    draw_all(pointer<double>(wide_keys));
  }
  return {rows, position};
}

std::tuple<Tensor, Tensor, Tensor> residual_gather_norm(const Tensor& x, const OptionalTensor& rows,
                                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                                        double eps, ScalarType dtype) {
  const int64_t C = x.size(1), t = rows ? rows->numel() : x.size(0);
  const ScalarType x_dtype = x.scalar_type(), h_dtype = computed_dtype(dtype, x_dtype);
  Tensor h = torch::stable::new_empty(x, {t, C}, h_dtype);
  Tensor mean = torch::stable::new_empty(x, {t}, accumulation_dtype(x_dtype));
  Tensor rstd = torch::stable::new_empty(x, {t}, accumulation_dtype(x_dtype));
  dispatch(x_dtype, h_dtype, [&]<class X, class H>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(gather_norm<X, H>);
    const std::vector<A> weights = parameter<A>(weight, C, 1), biases = parameter<A>(bias, C, 0);
    const GatherNorm<X, H> args{.x = pointer<X>(x),
                                .rows = pointer<int32_t>(rows),
                                .weight = weights.data(),
                                .bias = biases.data(),
                                .eps = eps,
                                .C = C,
                                .h = written<H>(h),
                                .mean = written<A>(mean),
                                .rstd = written<A>(rstd)};
    parallel_for(0, t, token_grain(C), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
  return {to(h, dtype), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> residual_gather_norm_backward(
    const Tensor& grad_h, const Tensor& grad_x, const OptionalTensor& x, const OptionalTensor& h,
    const OptionalTensor& rows, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
    const OptionalTensor& bias) {
  const int64_t T = grad_x.size(0), C = grad_x.size(1);
  const ScalarType dtype = grad_x.scalar_type();
  const Tensor near_grad_h = beside(grad_h, dtype);
  const OptionalTensor near_h = h ? OptionalTensor(beside(*h, dtype)) : std::nullopt;
  Tensor dx = torch::stable::empty_like(grad_x);
  OptionalTensor dweight, dbias;
  dispatch(dtype, near_grad_h.scalar_type(), [&]<class X, class H>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(gather_norm_backward<X, H>);
    const std::vector<A> weights = parameter<A>(weight, C, 1), biases = parameter<A>(bias, C, 0);
    std::vector<A> inverses(C);
    std::transform(weights.begin(), weights.end(), inverses.begin(), [](A w) { return w == 0 ? 0 : 1 / w; });
    const int32_t* kept = pointer<int32_t>(rows);
    const GatherNormBackward<X, H> args{.grad_h = pointer<H>(near_grad_h),
                                        .grad_x = pointer<X>(grad_x),
                                        .x = pointer<X>(x),
                                        .h = pointer<H>(near_h),
                                        .rows = kept,
                                        .mean = pointer<A>(mean),
                                        .rstd = pointer<A>(rstd),
                                        .weight = weights.data(),
                                        .bias = biases.data(),
                                        .inverse_weight = inverses.data(),
                                        .C = C,
                                        .dx = written<X>(dx)};
    // The first kept token that is not before this token; kept tokens are in ascending order.
    const auto first_from = [&](int64_t token) {
      return kept ? std::lower_bound(kept, kept + rows->numel(), token) - kept : token;
    };
    const Sums sums = two_sums_over_tokens(T, C, [&](int64_t begin, int64_t end, double* first, double* second) {
      kernel(args, begin, end, first_from(begin), first_from(end), first, second);
    });
    dweight = gradient<A>(grad_x, sums.first);
    dbias = gradient<A>(grad_x, sums.second);
  });
  return {dx, *dweight, *dbias};
}

Tensor residual_scatter(const Tensor& x, const Tensor& residual, const OptionalTensor& position,
                        const OptionalTensor& scale, const OptionalTensor& gamma, const OptionalTensor& bias) {
  const int64_t T = x.size(0), C = x.size(1);
  const Tensor r = beside(residual, x.scalar_type());
  Tensor y = torch::stable::empty_like(x);
  dispatch(x.scalar_type(), r.scalar_type(), [&]<class X, class H>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(scatter_dense<X, H>);
    const std::vector<A> gammas = parameter<A>(gamma, C, 1), biases = parameter<A>(bias, C, 0);
    const Scatter<X, H> args{.x = pointer<X>(x),
                             .residual = pointer<H>(r),
                             .rows = nullptr,
                             .position = pointer<int32_t>(position),
                             .scale = pointer<A>(scale),
                             .gamma = gammas.data(),
                             .bias = biases.data(),
                             .C = C,
                             .y = written<X>(y)};
    parallel_for(0, T, token_grain(C), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
  return y;
}

void residual_scatter_(Tensor x, const Tensor& residual, const OptionalTensor& rows, const OptionalTensor& scale,
                       const OptionalTensor& gamma, const OptionalTensor& bias) {
  const int64_t C = x.size(1);
  const Tensor r = beside(residual, x.scalar_type());
  dispatch(x.scalar_type(), r.scalar_type(), [&]<class X, class H>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(scatter_kept<X, H>);
    const std::vector<A> gammas = parameter<A>(gamma, C, 1), biases = parameter<A>(bias, C, 0);
    X* tokens = static_cast<X*>(x.mutable_data_ptr());
    const Scatter<X, H> args{.x = tokens,
                             .residual = pointer<H>(r),
                             .rows = pointer<int32_t>(rows),
                             .position = nullptr,
                             .scale = pointer<A>(scale),
                             .gamma = gammas.data(),
                             .bias = biases.data(),
                             .C = C,
                             .y = tokens};
    parallel_for(0, r.size(0), token_grain(C), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

std::tuple<Tensor, Tensor, Tensor> residual_scatter_backward(const Tensor& grad, const OptionalTensor& residual,
                                                             const OptionalTensor& rows, const OptionalTensor& scale,
                                                             const OptionalTensor& gamma, const OptionalTensor& bias,
                                                             ScalarType dtype) {
  const int64_t C = grad.size(1), t = rows ? rows->numel() : grad.size(0);
  const ScalarType r_dtype = computed_dtype(dtype, grad.scalar_type());
  const OptionalTensor r = residual ? OptionalTensor(to(*residual, r_dtype)) : std::nullopt;
  Tensor dresidual = torch::stable::new_empty(grad, {t, C}, r_dtype);
  OptionalTensor dgamma, dbias;
  dispatch(grad.scalar_type(), r_dtype, [&]<class X, class H>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(scatter_backward<X, H>);
    const std::vector<A> gammas = parameter<A>(gamma, C, 1), biases = parameter<A>(bias, C, 0);
    const ScatterBackward<X, H> args{.grad = pointer<X>(grad),
                                     .residual = pointer<H>(r),
                                     .rows = pointer<int32_t>(rows),
                                     .scale = pointer<A>(scale),
                                     .gamma = gammas.data(),
                                     .bias = biases.data(),
                                     .C = C,
                                     .dresidual = written<H>(dresidual)};
    const Sums sums = two_sums_over_tokens(t, C, [&](int64_t begin, int64_t end, double* first, double* second) {
      kernel(args, begin, end, first, second);
    });
    dgamma = gradient<A>(grad, gamma ? sums.first : std::vector<double>());
    dbias = gradient<A>(grad, bias ? sums.second : std::vector<double>());
  });
  return {to(dresidual, dtype), *dgamma, *dbias};
}

// The next two run one operator after the other. Tile by tile, with the tokens in the cache, the forward pass took 0.96
// to 1.08 times as long, and the backward pass 0.94 to 0.98 times: docs/operators/residual.md.

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_scatter_gather_norm(
    const Tensor& x, const Tensor& residual, const OptionalTensor& position, const OptionalTensor& scale,
    const OptionalTensor& gamma, const OptionalTensor& bias, const OptionalTensor& next_rows,
    const OptionalTensor& next_position, const OptionalTensor& weight, const OptionalTensor& norm_bias, double eps,
    ScalarType dtype) {
  const Tensor y = residual_scatter(x, residual, position, scale, gamma, bias);
  const auto [h, mean, rstd] = residual_gather_norm(y, next_rows, weight, norm_bias, eps, dtype);
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> residual_scatter_gather_norm_backward(
    const Tensor& grad_h, const Tensor& grad_y, const OptionalTensor& y, const OptionalTensor& h,
    const OptionalTensor& next_rows, const OptionalTensor& next_position, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, const OptionalTensor& norm_bias, const OptionalTensor& residual,
    const OptionalTensor& rows, const OptionalTensor& position, const OptionalTensor& scale,
    const OptionalTensor& gamma, const OptionalTensor& bias, ScalarType dtype) {
  const auto [dx, dweight, dnorm_bias] =
      residual_gather_norm_backward(grad_h, grad_y, y, h, next_rows, mean, rstd, weight, norm_bias);
  const auto [dresidual, dgamma, dbias] = residual_scatter_backward(dx, residual, rows, scale, gamma, bias, dtype);
  return {dx, dweight, dnorm_bias, dresidual, dgamma, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dinov2_kernels, CPU, m) {
  m.impl("residual_kept_rows", TORCH_BOX(&residual_kept_rows));
  m.impl("residual_gather_norm", TORCH_BOX(&residual_gather_norm));
  m.impl("residual_gather_norm_backward", TORCH_BOX(&residual_gather_norm_backward));
  m.impl("residual_scatter", TORCH_BOX(&residual_scatter));
  m.impl("residual_scatter_", TORCH_BOX(&residual_scatter_));
  m.impl("residual_scatter_backward", TORCH_BOX(&residual_scatter_backward));
  m.impl("residual_scatter_gather_norm", TORCH_BOX(&residual_scatter_gather_norm));
  m.impl("residual_scatter_gather_norm_backward", TORCH_BOX(&residual_scatter_gather_norm_backward));
}
