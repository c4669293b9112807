// The cross-entropy of prototypes on CPU: the operators on a chunk of c prototypes, and how threads share their work.
// cpu_kernels.cpp has the work of a thread; the definition is dinov2_kernels/prototype_cross_entropy/reference.py.
//
// Bytes: each operator reads its arguments once, or a second time from the cache, and writes its result once. A thread
// takes whole rows, so the result is the same for every number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "common/teacher_rows.h"
#include "prototype_cross_entropy/cpu_kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

namespace {

constexpr int64_t kGrain = 1 << 14;  // elements below which a second thread does not pay

// Calls body(row) for each of some rows of c elements.
template <class Body>
void parallel_rows(int64_t rows, int64_t c, const Body& body) {
  parallel_for(0, rows, std::max<int64_t>(kGrain / std::max<int64_t>(c, 1), 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// Calls body<X>() with the C++ type of the elements.
template <class Body>
void dispatch(const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return body.template operator()<double>();
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::BFloat16: return body.template operator()<bf16>();
    case ScalarType::Half: return body.template operator()<fp16>();
    default: STD_TORCH_CHECK(false, "logits: expected float64, float32, bfloat16 or float16");
  }
}

template <class X>
const X* pointer(const Tensor& tensor) {
  return static_cast<const X*>(tensor.const_data_ptr());
}

template <class X>
X* written(Tensor& tensor) {
  return static_cast<X*>(tensor.mutable_data_ptr());
}

// The index [N, J] of the M targets; without one, each row has its own number.
class Index {
 public:
  Index(const std::optional<Tensor>& index, int64_t M) {
    if (!index.has_value()) return;
    check_teacher_rows(*index, M);
    rows_ = pointer<int64_t>(*index), J_ = index->size(1);
  }
  int64_t J() const { return J_; }
  // `row` must live as long as the result.
  const int64_t* of(const int64_t& row) const { return rows_ == nullptr ? &row : rows_ + row * J_; }

 private:
  const int64_t* rows_ = nullptr;
  int64_t J_ = 1;
};

// A state [4, N]: the numbers of one row are N apart.
template <class A>
RowState<A> read_state(const A* state, int64_t N, int64_t row) {
  return {state[row], state[N + row], state[2 * N + row], state[3 * N + row]};
}

Tensor prototype_target_norm(const Tensor& teacher_logits, const Tensor& bias, double temperature) {
  const int64_t M = teacher_logits.size(0), K = teacher_logits.size(1), stride = teacher_logits.stride(0);
  Tensor norm = torch::stable::new_empty(teacher_logits, {2, M}, bias.scalar_type());
  dispatch(teacher_logits, [&]<class X>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(target_norm<X>);
    const X* t = pointer<X>(teacher_logits);
    const A* b = pointer<A>(bias);
    A* out = written<A>(norm);
    parallel_rows(M, K, [&](int64_t m) {
      const TargetNorm<A> row = kernel(t + m * stride, b, K, temperature);
      out[m] = row.maximum, out[M + m] = row.total;
    });
  });
  return norm;
}

void prototype_targets_(Tensor targets, const Tensor& teacher_logits, const Tensor& bias, const Tensor& norm,
                        double temperature) {
  const int64_t M = teacher_logits.size(0), c = teacher_logits.size(1), stride = teacher_logits.stride(0);
  dispatch(teacher_logits, [&]<class X>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(targets<X>);
    const X* t = pointer<X>(teacher_logits);
    const A *b = pointer<A>(bias), *n = pointer<A>(norm);
    A* q = written<A>(targets);
    parallel_rows(M, c, [&](int64_t m) {
      const X* next = t + std::min(m + 1, M - 1) * stride;
      kernel(t + m * stride, b, TargetNorm<A>{n[m], n[M + m]}, c, temperature, next, q + m * c);
    });
  });
}

void prototype_accumulate_(Tensor state, const Tensor& logits, const Tensor& targets, std::optional<Tensor> index,
                           double temperature) {
  const int64_t N = logits.size(0), c = logits.size(1);
  const Index rows(index, targets.size(0));
  dispatch(logits, [&]<class X>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(accumulate<X>);
    const X* s = pointer<X>(logits);
    const A* q = pointer<A>(targets);
    A* out = written<A>(state);
    parallel_rows(N, c, [&](int64_t n) {
      const RowState<A> row =
          kernel(read_state(out, N, n), s + n * c, q, rows.of(n), rows.J(), c, temperature);
      out[n] = row.maximum, out[N + n] = row.total, out[2 * N + n] = row.mass, out[3 * N + n] = row.cross;
    });
  });
}

void prototype_gradient_(Tensor logits, const Tensor& state, const Tensor& targets, std::optional<Tensor> index,
                         const Tensor& row_scale, double temperature) {
  const int64_t N = logits.size(0), c = logits.size(1);
  const Index rows(index, targets.size(0));
  dispatch(logits, [&]<class X>() {
    using A = accumulate_t<X>;
    const auto kernel = ON_CPU_TARGET(gradient<X>);
    const A *states = pointer<A>(state), *q = pointer<A>(targets), *scale = pointer<A>(row_scale);
    X* s = written<X>(logits);
    parallel_rows(N, c, [&](int64_t n) {
      kernel(read_state(states, N, n), q, rows.of(n), rows.J(), scale[n], c, temperature, s + n * c);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dinov2_kernels, CPU, m) {
  m.impl("prototype_target_norm", TORCH_BOX(&prototype_target_norm));
  m.impl("prototype_targets_", TORCH_BOX(&prototype_targets_));
  m.impl("prototype_accumulate_", TORCH_BOX(&prototype_accumulate_));
  m.impl("prototype_gradient_", TORCH_BOX(&prototype_gradient_));
}
