// The Sinkhorn-Knopp step on CPU: operators, and how threads share their work. What one thread does stands in
// cpu_kernels.cpp; the definition is dinov2_kernels/sinkhorn/reference.py.
//
// Bytes: column_logsumexp reads the logits once, from memory. column_mass reads them twice, along rows and then down
// columns: the sums of two threads never meet, so that no thread needs vectors [K] of its own, and the result is the
// same for every number of threads. assign reads them once from memory and writes the result, which stays in the cache
// until it is normalised. Nothing else is larger than [B].

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/huge_pages.h"
#include "sinkhorn/cpu_kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

namespace {

constexpr int64_t kGrain = 1 << 15;  // elements below which a second thread does not pay
constexpr int64_t kColumns = 64;     // threads part between multiples of this many columns: whole cache lines

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Each thread calls body(begin, end) for its share of K columns of B elements.
template <class Body>
void parallel_columns(int64_t B, int64_t K, const Body& body) {
  parallel_for(0, ceil_div(K, kColumns), ceil_div(kGrain, kColumns * std::max<int64_t>(B, 1)),
               [&](int64_t begin, int64_t end) { body(begin * kColumns, std::min(end * kColumns, K)); });
}

// Calls body(b) for each of B rows of K elements.
template <class Body>
void parallel_rows(int64_t B, int64_t K, const Body& body) {
  parallel_for(0, B, ceil_div(kGrain, std::max<int64_t>(K, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b);
  });
}

template <class X, class A = accumulate_t<X>>
void column_logsumexp(const X* x, int64_t B, int64_t K, double T, A* out) {
  const auto kernel = ON_CPU_TARGET(column_logsumexp<X>);
  parallel_columns(B, K, [&](int64_t begin, int64_t end) { kernel(x, B, K, T, begin, end, out); });
}

template <class X, class A = accumulate_t<X>>
void column_mass(const X* x, int64_t B, int64_t K, double T, const A* bias, A* out) {
  const auto row_scale = ON_CPU_TARGET(row_scale<X>);
  const auto column_mass = ON_CPU_TARGET(column_mass<X>);
  std::vector<RowScale<A>> rows(B);
  parallel_rows(B, K, [&](int64_t b) { rows[b] = row_scale(x + b * K, K, T, bias); });
  parallel_columns(B, K, [&](int64_t begin, int64_t end) {
    column_mass(x, B, K, T, bias, rows.data(), begin, end, out);
  });
}

template <class X, class A = accumulate_t<X>>
void assign(const X* x, int64_t B, int64_t K, double T, const A* bias, A* out) {
  advise_huge_pages(out, B * K * sizeof(A));
  const auto kernel = ON_CPU_TARGET(assign<X>);
  parallel_rows(B, K, [&](int64_t b) { kernel(x + b * K, K, T, bias, out + b * K); });
}

// Calls body(x) with the logits as a pointer to their type.
template <class Body>
void dispatch(const Tensor& logits, const Body& body) {
  const void* x = logits.const_data_ptr();
  switch (logits.scalar_type()) {
    case ScalarType::Double: return body(static_cast<const double*>(x));
    case ScalarType::Float: return body(static_cast<const float*>(x));
    case ScalarType::BFloat16: return body(static_cast<const bf16*>(x));
    case ScalarType::Half: return body(static_cast<const fp16*>(x));
    default: STD_TORCH_CHECK(false, "logits: expected float64, float32, bfloat16 or float16");
  }
}

ScalarType accumulation_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor sinkhorn_column_logsumexp(const Tensor& logits, double temperature) {
  const int64_t B = logits.size(0), K = logits.size(1);
  Tensor out = torch::stable::new_empty(logits, {K}, accumulation_dtype(logits));
  dispatch(logits, [&]<class X>(const X* x) {
    using A = accumulate_t<X>;
    column_logsumexp(x, B, K, temperature, out.mutable_data_ptr<A>());
  });
  return out;
}

Tensor sinkhorn_column_mass(const Tensor& logits, double temperature, const Tensor& bias) {
  const int64_t B = logits.size(0), K = logits.size(1);
  Tensor out = torch::stable::new_empty(logits, {K}, accumulation_dtype(logits));
  dispatch(logits, [&]<class X>(const X* x) {
    using A = accumulate_t<X>;
    column_mass(x, B, K, temperature, bias.const_data_ptr<A>(), out.mutable_data_ptr<A>());
  });
  return out;
}

Tensor sinkhorn_assign(const Tensor& logits, double temperature, const Tensor& bias) {
  const int64_t B = logits.size(0), K = logits.size(1);
  Tensor out = torch::stable::new_empty(logits, {B, K}, accumulation_dtype(logits));
  dispatch(logits, [&]<class X>(const X* x) {
    using A = accumulate_t<X>;
    assign(x, B, K, temperature, bias.const_data_ptr<A>(), out.mutable_data_ptr<A>());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dinov2_kernels, CPU, m) {
  m.impl("sinkhorn_column_logsumexp", TORCH_BOX(&sinkhorn_column_logsumexp));
  m.impl("sinkhorn_column_mass", TORCH_BOX(&sinkhorn_column_mass));
  m.impl("sinkhorn_assign", TORCH_BOX(&sinkhorn_assign));
}
