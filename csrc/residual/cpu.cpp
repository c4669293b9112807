// Residual connections on CPU: operators, and how threads share their work. What one thread does stands in
// cpu_kernels.cpp; the definition is dinov2_kernels/residual/reference.py.
//
// Every operator is one pass over its tokens; a token is read from memory once and then from the cache. What two passes
// do is done tile by tile, while the tokens are in the cache. Gradients of parameters are sums over tokens: each fixed
// chunk of tokens has a partial sum of its own, and these are added in order, so that the result is the same for every
// number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/huge_pages.h"
#include "residual/cpu_kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

constexpr int64_t kGrain = 1 << 15;  // elements below which a second thread does not pay
constexpr int64_t kChunks = 128;     // at most, of a sum over tokens
constexpr int64_t kTile = 1 << 14;   // elements of tokens that stay in the cache from one pass to the next
constexpr int64_t kAligned = 4;      // rows and positions of a draw start at a multiple of so many

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tokens of C elements that are worth a thread.
int64_t token_grain(int64_t C) { return ceil_div(kGrain, std::max<int64_t>(C, 1)); }

// Calls body(begin, end) for tile after tile of [begin, end).
template <class Body>
void for_each_tile(int64_t begin, int64_t end, int64_t C, const Body& body) {
  const int64_t size = std::max<int64_t>(kTile / std::max<int64_t>(C, 1), 1);
  for (; begin < end; begin += size) body(begin, std::min(begin + size, end));
}

// Calls body(begin, end, sums) for chunks of [0, tokens), and returns what body adds to its sums [num_sums][C], in the
// order of the chunks.
template <class Body>
std::vector<std::vector<double>> sum_over_tokens(int64_t tokens, int64_t C, int num_sums, const Body& body) {
  const int64_t size = std::max(token_grain(C), ceil_div(tokens, kChunks)), chunks = ceil_div(tokens, size);
  std::vector<double> partial(chunks * num_sums * C);  // [chunks, num_sums, C]
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      std::vector<double*> sums;
      for (int i = 0; i < num_sums; ++i) sums.push_back(partial.data() + (chunk * num_sums + i) * C);
      body(chunk * size, std::min((chunk + 1) * size, tokens), sums);
    }
  });
  std::vector<std::vector<double>> total(num_sums, std::vector<double>(C));
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int i = 0; i < num_sums; ++i)
      for (int64_t c = 0; c < C; ++c) total[i][c] += partial[(chunk * num_sums + i) * C + c];
  return total;
}

// ---- dtypes

ScalarType accumulation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor to(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// The dtype to compute with beside tokens of dtype x: `dtype` itself where that pair is compiled. float64 beside
// anything narrower is not; it is so rare that a converted copy will do.
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

// Calls body<X, H>() with the C++ types of tokens and of what the branch reads or returns.
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

// Where a fresh result is to be written.
template <class X>
X* written(Tensor& tensor) {
  advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * sizeof(X));
  return static_cast<X*>(tensor.mutable_data_ptr());
}

// A parameter [C] of any dtype in A; one that is absent is `fill` everywhere. A pass shares it with its copies.
template <class A>
std::shared_ptr<std::vector<A>> parameter(const OptionalTensor& tensor, int64_t C, A fill) {
  if (!tensor) return std::make_shared<std::vector<A>>(C, fill);
  const Tensor converted = to(*tensor, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
  return std::make_shared<std::vector<A>>(pointer<A>(converted), pointer<A>(converted) + C);
}

// The gradient of a parameter, from its sum; of size 0 where there is no such parameter.
Tensor gradient(const Tensor& like, const std::vector<double>& sum, bool wanted = true) {
  const ScalarType dtype = accumulation_dtype(like.scalar_type());
  const int64_t size = wanted ? sum.size() : 0;
  Tensor out = torch::stable::new_empty(like, {size}, dtype);
  if (dtype == ScalarType::Double) {
    std::copy_n(sum.begin(), size, static_cast<double*>(out.mutable_data_ptr()));
  } else {
    std::copy_n(sum.begin(), size, static_cast<float*>(out.mutable_data_ptr()));
  }
  return out;
}

// How many of the kept rows, which are in ascending order, come before this token.
int64_t kept_before(const OptionalTensor& rows, int64_t token) {
  if (!rows) return token;
  const int32_t* row = pointer<int32_t>(*rows);
  return std::lower_bound(row, row + rows->numel(), token) - row;
}

// ---- the draw

// One draw: writes the rows of the kept samples, kept[r] of each run, and into `place`, which is -1 throughout, where
// each kept token went.
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
  for (int64_t d = 1; d < draws; ++d)  // the end of a gap is known, and what a draw writes comes after it
    std::fill(row + std::max<int64_t>(first_row[d] - (kAligned - 1), 0), row + first_row[d], 0);
  const auto draw_all = [&]<class Key>(const Key* key) {
    parallel_for(0, draws, 1, [&](int64_t begin, int64_t end) {
      for (int64_t d = begin; d < end; ++d) {
        keep_smallest(key + d * samples, runs, kept.data() + d * num_runs, row + first_row[d], place + d * stride);
      }
    });
  };
  if (keys.scalar_type() == ScalarType::Float) {  // as they are drawn: converting them would cost more than the rest
    draw_all(pointer<float>(keys));
  } else {
    const Tensor wide_keys = to(keys, ScalarType::Double);
    draw_all(pointer<double>(wide_keys));
  }
  return {rows, position};
}

// ---- passes: what an operator does to some of its tokens. Their arguments are those of the operators; what they
// convert they capture, so that it lives as long as they do.

using Pass = std::function<void(int64_t begin, int64_t end)>;
using SummingPass = std::function<void(int64_t begin, int64_t end, double* first_sum, double* second_sum)>;

// Over the kept tokens.
Pass gather_norm_pass(const Tensor& x, const OptionalTensor& rows, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps, Tensor& h, Tensor& mean, Tensor& rstd) {
  const int64_t C = x.size(1);
  Pass pass;
  dispatch(x.scalar_type(), h.scalar_type(), [&]<class X, class H>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(gather_norm<X, H>);
    const auto weights = parameter<A>(weight, C, 1), biases = parameter<A>(bias, C, 0);
    const GatherNorm<X, H> args{.x = pointer<X>(x),
                                .rows = pointer<int32_t>(rows),
                                .weight = weights->data(),
                                .bias = biases->data(),
                                .eps = eps,
                                .C = C,
                                .h = written<H>(h),
                                .mean = written<A>(mean),
                                .rstd = written<A>(rstd)};
    pass = [kernel, args, weights, biases](int64_t begin, int64_t end) { kernel(args, begin, end); };
  });
  return pass;
}

// Over all tokens; sums are those of weight and bias.
SummingPass gather_norm_backward_pass(const Tensor& grad_h, const Tensor& grad_x, const OptionalTensor& x,
                                      const OptionalTensor& h, const OptionalTensor& rows, const Tensor& mean,
                                      const Tensor& rstd, const OptionalTensor& weight, const OptionalTensor& bias,
                                      Tensor& dx) {
  const int64_t C = grad_x.size(1);
  const ScalarType dtype = grad_x.scalar_type();
  const Tensor near_grad_h = beside(grad_h, dtype);
  const OptionalTensor near_h = h ? OptionalTensor(beside(*h, dtype)) : std::nullopt;
  SummingPass pass;
  dispatch(dtype, near_grad_h.scalar_type(), [&]<class X, class H>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(gather_norm_backward<X, H>);
    const auto weights = parameter<A>(weight, C, 1), biases = parameter<A>(bias, C, 0);
    const auto inverses = std::make_shared<std::vector<A>>(C);
    std::transform(weights->begin(), weights->end(), inverses->begin(), [](A w) { return w == 0 ? 0 : 1 / w; });
    const GatherNormBackward<X, H> args{.grad_h = pointer<H>(near_grad_h),
                                        .grad_x = pointer<X>(grad_x),
                                        .x = pointer<X>(x),
                                        .h = pointer<H>(near_h),
                                        .rows = pointer<int32_t>(rows),
                                        .mean = pointer<A>(mean),
                                        .rstd = pointer<A>(rstd),
                                        .weight = weights->data(),
                                        .bias = biases->data(),
                                        .inverse_weight = inverses->data(),
                                        .C = C,
                                        .dx = written<X>(dx)};
    pass = [kernel, args, rows, weights, biases, inverses, near_grad_h, near_h](int64_t begin, int64_t end,
                                                                                double* dweight, double* dbias) {
      kernel(args, begin, end, kept_before(rows, begin), kept_before(rows, end), dweight, dbias);
    };
  });
  return pass;
}

// Over all tokens.
Pass scatter_pass(const Tensor& x, const Tensor& residual, const OptionalTensor& position, const OptionalTensor& scale,
                  const OptionalTensor& gamma, const OptionalTensor& bias, Tensor& y) {
  const int64_t C = x.size(1);
  const Tensor r = beside(residual, x.scalar_type());
  Pass pass;
  dispatch(x.scalar_type(), r.scalar_type(), [&]<class X, class H>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(scatter_dense<X, H>);
    const auto gammas = parameter<A>(gamma, C, 1), biases = parameter<A>(bias, C, 0);
    const Scatter<X, H> args{.x = pointer<X>(x),
                             .residual = pointer<H>(r),
                             .rows = nullptr,
                             .position = pointer<int32_t>(position),
                             .scale = pointer<A>(scale),
                             .gamma = gammas->data(),
                             .bias = biases->data(),
                             .C = C,
                             .y = written<X>(y)};
    pass = [kernel, args, r, gammas, biases](int64_t begin, int64_t end) { kernel(args, begin, end); };
  });
  return pass;
}

// Over the kept tokens; sums are those of gamma and bias.
SummingPass scatter_backward_pass(const Tensor& grad, const OptionalTensor& residual, const OptionalTensor& rows,
                                  const OptionalTensor& scale, const OptionalTensor& gamma,
                                  const OptionalTensor& bias, Tensor& dresidual) {
  const int64_t C = grad.size(1);
  const OptionalTensor r = residual ? OptionalTensor(to(*residual, dresidual.scalar_type())) : std::nullopt;
  SummingPass pass;
  dispatch(grad.scalar_type(), dresidual.scalar_type(), [&]<class X, class H>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(scatter_backward<X, H>);
    const auto gammas = parameter<A>(gamma, C, 1), biases = parameter<A>(bias, C, 0);
    const ScatterBackward<X, H> args{.grad = pointer<X>(grad),
                                     .residual = pointer<H>(r),
                                     .rows = pointer<int32_t>(rows),
                                     .scale = pointer<A>(scale),
                                     .gamma = gammas->data(),
                                     .bias = biases->data(),
                                     .C = C,
                                     .dresidual = written<H>(dresidual)};
    pass = [kernel, args, r, gammas, biases](int64_t begin, int64_t end, double* dgamma, double* dbias) {
      kernel(args, begin, end, dgamma, dbias);
    };
  });
  return pass;
}

// ---- operators

// Results of a norm of t tokens like x: h in the dtype that is computed, mean and rstd.
std::array<Tensor, 3> new_norm(const Tensor& x, int64_t t, ScalarType dtype) {
  const ScalarType x_dtype = x.scalar_type(), wide = accumulation_dtype(x_dtype);
  return {torch::stable::new_empty(x, {t, x.size(1)}, computed_dtype(dtype, x_dtype)),
          torch::stable::new_empty(x, {t}, wide), torch::stable::new_empty(x, {t}, wide)};
}

// The gradient of a residual: of those tokens of a tensor like `grad` that are kept, in the dtype that is computed.
Tensor new_residual(const Tensor& grad, const OptionalTensor& rows, ScalarType dtype) {
  const int64_t t = rows ? rows->numel() : grad.size(0);
  return torch::stable::new_empty(grad, {t, grad.size(1)}, computed_dtype(dtype, grad.scalar_type()));
}

std::tuple<Tensor, Tensor, Tensor> residual_gather_norm(const Tensor& x, const OptionalTensor& rows,
                                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                                        double eps, ScalarType dtype) {
  const int64_t t = rows ? rows->numel() : x.size(0);
  auto [h, mean, rstd] = new_norm(x, t, dtype);
  parallel_for(0, t, token_grain(x.size(1)), gather_norm_pass(x, rows, weight, bias, eps, h, mean, rstd));
  return {to(h, dtype), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> residual_gather_norm_backward(
    const Tensor& grad_h, const Tensor& grad_x, const OptionalTensor& x, const OptionalTensor& h,
    const OptionalTensor& rows, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
    const OptionalTensor& bias) {
  Tensor dx = torch::stable::empty_like(grad_x);
  const auto pass = gather_norm_backward_pass(grad_h, grad_x, x, h, rows, mean, rstd, weight, bias, dx);
  const auto sums = sum_over_tokens(grad_x.size(0), grad_x.size(1), 2, [&](int64_t begin, int64_t end, auto& sum) {
    pass(begin, end, sum[0], sum[1]);
  });
  return {dx, gradient(grad_x, sums[0]), gradient(grad_x, sums[1])};
}

Tensor residual_scatter(const Tensor& x, const Tensor& residual, const OptionalTensor& position,
                        const OptionalTensor& scale, const OptionalTensor& gamma, const OptionalTensor& bias) {
  Tensor y = torch::stable::empty_like(x);
  parallel_for(0, x.size(0), token_grain(x.size(1)), scatter_pass(x, residual, position, scale, gamma, bias, y));
  return y;
}

void residual_scatter_(Tensor x, const Tensor& residual, const OptionalTensor& rows, const OptionalTensor& scale,
                       const OptionalTensor& gamma, const OptionalTensor& bias) {
  const int64_t C = x.size(1);
  const Tensor r = beside(residual, x.scalar_type());
  dispatch(x.scalar_type(), r.scalar_type(), [&]<class X, class H>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(scatter_kept<X, H>);
    const auto gammas = parameter<A>(gamma, C, 1), biases = parameter<A>(bias, C, 0);
    X* tokens = static_cast<X*>(x.mutable_data_ptr());
    const Scatter<X, H> args{.x = tokens,
                             .residual = pointer<H>(r),
                             .rows = pointer<int32_t>(rows),
                             .position = nullptr,
                             .scale = pointer<A>(scale),
                             .gamma = gammas->data(),
                             .bias = biases->data(),
                             .C = C,
                             .y = tokens};
    parallel_for(0, r.size(0), token_grain(C), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

std::tuple<Tensor, Tensor, Tensor> residual_scatter_backward(const Tensor& grad, const OptionalTensor& residual,
                                                             const OptionalTensor& rows, const OptionalTensor& scale,
                                                             const OptionalTensor& gamma, const OptionalTensor& bias,
                                                             ScalarType dtype) {
  Tensor dresidual = new_residual(grad, rows, dtype);
  const auto pass = scatter_backward_pass(grad, residual, rows, scale, gamma, bias, dresidual);
  const auto sums = sum_over_tokens(dresidual.size(0), grad.size(1), 2, [&](int64_t begin, int64_t end, auto& sum) {
    pass(begin, end, sum[0], sum[1]);
  });
  const bool has_gamma = gamma.has_value(), has_bias = bias.has_value();
  return {to(dresidual, dtype), gradient(grad, sums[0], has_gamma), gradient(grad, sums[1], has_bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_scatter_gather_norm(
    const Tensor& x, const Tensor& residual, const OptionalTensor& position, const OptionalTensor& scale,
    const OptionalTensor& gamma, const OptionalTensor& bias, const OptionalTensor& next_rows,
    const OptionalTensor& next_position, const OptionalTensor& weight, const OptionalTensor& norm_bias, double eps,
    ScalarType dtype) {
  const int64_t T = x.size(0), C = x.size(1);
  Tensor y = torch::stable::empty_like(x);
  auto [h, mean, rstd] = new_norm(x, next_rows ? next_rows->numel() : T, dtype);
  const Pass scatter = scatter_pass(x, residual, position, scale, gamma, bias, y);
  const Pass gather = gather_norm_pass(y, next_rows, weight, norm_bias, eps, h, mean, rstd);
  parallel_for(0, T, token_grain(C), [&](int64_t begin, int64_t end) {
    for_each_tile(begin, end, C, [&](int64_t first, int64_t last) {
      scatter(first, last);
      gather(kept_before(next_rows, first), kept_before(next_rows, last));
    });
  });
  return {y, to(h, dtype), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> residual_scatter_gather_norm_backward(
    const Tensor& grad_h, const Tensor& grad_y, const OptionalTensor& y, const OptionalTensor& h,
    const OptionalTensor& next_rows, const OptionalTensor& next_position, const Tensor& mean, const Tensor& rstd,
    const OptionalTensor& weight, const OptionalTensor& norm_bias, const OptionalTensor& residual,
    const OptionalTensor& rows, const OptionalTensor& position, const OptionalTensor& scale,
    const OptionalTensor& gamma, const OptionalTensor& bias, ScalarType dtype) {
  const int64_t T = grad_y.size(0), C = grad_y.size(1);
  Tensor dx = torch::stable::empty_like(grad_y), dresidual = new_residual(grad_y, rows, dtype);
  const auto gather = gather_norm_backward_pass(grad_h, grad_y, y, h, next_rows, mean, rstd, weight, norm_bias, dx);
  const auto scatter = scatter_backward_pass(dx, residual, rows, scale, gamma, bias, dresidual);
  const auto sums = sum_over_tokens(T, C, 4, [&](int64_t begin, int64_t end, auto& sum) {
    for_each_tile(begin, end, C, [&](int64_t first, int64_t last) {
      gather(first, last, sum[0], sum[1]);
      scatter(kept_before(rows, first), kept_before(rows, last), sum[2], sum[3]);
    });
  });
  const Tensor dgamma = gradient(grad_y, sums[2], gamma.has_value());
  const Tensor dbias = gradient(grad_y, sums[3], bias.has_value());
  return {dx, gradient(grad_y, sums[0]), gradient(grad_y, sums[1]), to(dresidual, dtype), dgamma, dbias};
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
