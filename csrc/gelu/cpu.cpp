// GELU's backward pass on CPU: the operator, and how threads share its work. cpu_kernels.cpp has the
// work of one thread; the definition is dinov2_kernels/gelu/reference.py.
//
// Bytes: reads grad and z once, and writes grad and h once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/huge_pages.h"
#include "common/sum_over_tokens.h"
#include "gelu/cpu_kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kGrain = 1 << 14;  // elements below which a second thread does not pay

// Calls body<X>() with the C++ type of the elements.
template <class Body>
void dispatch(const Tensor& z, const Body& body) {
  switch (z.scalar_type()) {
    case ScalarType::Double: return body.template operator()<double>();
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::BFloat16: return body.template operator()<bf16>();
    case ScalarType::Half: return body.template operator()<fp16>();
    default: STD_TORCH_CHECK(false, "z: expected float64, float32, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor> gelu_backward_(Tensor grad, const Tensor& z, bool tanh) {
  const int64_t H = z.size(-1);
  Tensor h = torch::stable::empty_like(z);
  const bool is_double = z.scalar_type() == ScalarType::Double;
  Tensor sum = torch::stable::new_empty(z, {H}, is_double ? ScalarType::Double : ScalarType::Float);
  dispatch(z, [&]<class X>() {
    const auto kernel = tanh ? ON_CPU_TARGET(gelu_backward<X, true>) : ON_CPU_TARGET(gelu_backward<X, false>);
    X *g = static_cast<X*>(grad.mutable_data_ptr()), *out = static_cast<X*>(h.mutable_data_ptr());
    const X* x = static_cast<const X*>(z.const_data_ptr());
    advise_huge_pages(out, h.numel() * sizeof(X));
    const int64_t width = std::max<int64_t>(H, 1);
    const std::vector<double> sums = sum_over_tokens(
        z.numel() / width, ceil_div(kGrain, width), H, [&](int64_t begin, int64_t end, double* part) {
          kernel(g + begin * H, x + begin * H, end - begin, H, out + begin * H, part);
        });
    std::copy(sums.begin(), sums.end(), static_cast<accumulate_t<X>*>(sum.mutable_data_ptr()));
  });
  return {h, sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dinov2_kernels, CPU, m) { m.impl("gelu_backward_", TORCH_BOX(&gelu_backward_)); }
