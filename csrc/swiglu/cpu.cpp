// SwiGLU on CPU: operators, and how threads share their work. cpu_kernels.cpp has the work of one thread; the
// definition is dinov2_kernels/swiglu/reference.py.
//
// Bytes: each operator reads its arguments once and writes its result once, and keeps nothing else.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/huge_pages.h"
#include "common/sum_over_tokens.h"
#include "swiglu/cpu_kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

namespace {

constexpr int64_t kGrain = 1 << 14;  // results below which a second thread does not pay

// Calls body<X>() with the C++ type of the elements.
template <class Body>
void dispatch(const Tensor& x12, const Body& body) {
  switch (x12.scalar_type()) {
    case ScalarType::Double: return body.template operator()<double>();
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::BFloat16: return body.template operator()<bf16>();
    case ScalarType::Half: return body.template operator()<fp16>();
    default: STD_TORCH_CHECK(false, "x12: expected float64, float32, bfloat16 or float16");
  }
}

template <class X>
const X* pointer(const Tensor& tensor) {
  return static_cast<const X*>(tensor.const_data_ptr());
}

// The memory of a new result.
template <class X>
X* written(Tensor& tensor) {
  X* data = static_cast<X*>(tensor.mutable_data_ptr());
  advise_huge_pages(data, tensor.numel() * sizeof(X));
  return data;
}

// Each thread calls body(begin, end) for its share of the rows, which have H results each.
template <class Body>
void parallel_rows(const Tensor& x12, int64_t H, const Body& body) {
  if (H == 0) return;
  parallel_for(0, x12.numel() / (2 * H), std::max<int64_t>(kGrain / H, 1), body);
}

Tensor swiglu(const Tensor& x12) {
  const int64_t H = x12.size(-1) / 2;
  std::vector<int64_t> shape(x12.sizes().begin(), x12.sizes().end());
  shape.back() = H;
  Tensor y = torch::stable::new_empty(x12, shape);  // [..., H]
  dispatch(x12, [&]<class X>() {
    const auto kernel = ON_CPU_TARGET(swiglu<X>);
    const X* x = pointer<X>(x12);
    X* out = written<X>(y);
    parallel_rows(x12, H, [&](int64_t begin, int64_t end) {
      kernel(x + begin * 2 * H, end - begin, H, out + begin * H);
    });
  });
  return y;
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& x12) {
  const int64_t H = x12.size(-1) / 2;
  Tensor dx12 = torch::stable::new_empty(x12, x12.sizes());  // [..., 2H]
  dispatch(x12, [&]<class X>() {
    const auto kernel = ON_CPU_TARGET(swiglu_backward<X>);
    const X *g = pointer<X>(grad), *x = pointer<X>(x12);
    X* out = written<X>(dx12);
    parallel_rows(x12, H, [&](int64_t begin, int64_t end) {
      kernel(g + begin * H, x + begin * 2 * H, end - begin, H, out + begin * 2 * H);
    });
  });
  return dx12;
}

std::tuple<Tensor, Tensor> swiglu_backward_(Tensor grad, const Tensor& x12) {
  const int64_t H = x12.size(-1) / 2;
  Tensor dx12 = torch::stable::new_empty(x12, x12.sizes());  // [..., 2H]
  const bool is_double = x12.scalar_type() == ScalarType::Double;
  Tensor sum = torch::stable::new_empty(x12, {2 * H}, is_double ? ScalarType::Double : ScalarType::Float);
  dispatch(x12, [&]<class X>() {
    const auto kernel = ON_CPU_TARGET(swiglu_backward_with_sums<X>);
    X* g = static_cast<X*>(grad.mutable_data_ptr());
    const X* x = pointer<X>(x12);
    X* out = written<X>(dx12);
    const int64_t width = std::max<int64_t>(H, 1);
    const std::vector<double> sums = sum_over_tokens(
        grad.numel() / width, ceil_div(kGrain, width), 2 * H, [&](int64_t begin, int64_t end, double* part) {
          kernel(g + begin * H, x + begin * 2 * H, end - begin, H, out + begin * 2 * H, part);
        });
    std::copy(sums.begin(), sums.end(), static_cast<accumulate_t<X>*>(sum.mutable_data_ptr()));
  });
  return {dx12, sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dinov2_kernels, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("swiglu_backward_", TORCH_BOX(&swiglu_backward_));
}
