// The Sinkhorn-Knopp step on CPU: operators, and how threads share their work. cpu_kernels.cpp has the work of one
// thread; the definition is dinov2_kernels/sinkhorn/reference.py.
//
// Bytes: sinkhorn_bias has all rows. It reads the logits once per iteration and takes one exponential of each: it goes
// through a tile of columns with all its rows, and their p stay in the cache until the columns' sums are known. p
// divided by these sums gives the rows' sums of the next iteration.
//
// The other operators are its passes; several processes reduce a vector between two passes. column_logsumexp reads the
// logits once, from memory. column_mass reads them twice, along rows and then down columns: each sum is made by one
// thread, so no thread needs vectors [K] of its own, and the result is the same for every number of threads. assign
// reads them once from memory and writes the result, which stays in the cache until it is normalised. Operators allocate
// only vectors [B] and [K], and sinkhorn_bias also a tile per thread.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/huge_pages.h"
#include "sinkhorn/cpu_kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

namespace {

constexpr int64_t kGrain = 1 << 15;  // elements below which a second thread does not pay
constexpr int64_t kColumns = 64;     // the share of a thread is a multiple of this many columns: whole cache lines

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

struct alignas(64) CacheLine {
  char bytes[64];
};

// Columns of a tile: their p stays in the second-level cache. With very many rows it stays in the third-level cache,
// because a narrower tile would be read more slowly.
int64_t tile_width(int64_t B, int64_t bytes) {
  constexpr int64_t kCached = 256 << 10, kMinTileWidth = 128;
  const int64_t width = kCached / (std::max<int64_t>(B, 1) * bytes) / kColumns * kColumns;
  return std::clamp(width, kMinTileWidth, kMaxTileWidth);
}

// The state of the whole loop for a batch that this process holds.
template <class X, class A = accumulate_t<X>>
class SinkhornKnopp {
 public:
  SinkhornKnopp(const X* x, int64_t B, int64_t K, double T, A* bias)
      : x(x), B(B), K(K), T(T), bias(bias), rows(B, RowScale<A>{0, 1}), row_sums(groups * B) {}

  // bias = log u.
  void run(int64_t n_iterations) {
    iteration(true);
    for (int64_t i = 2; i < n_iterations; ++i) {
      scale_rows();
      iteration(false);
    }
    if (n_iterations > 1) {
      scale_rows();
      last_iteration();
    }
  }

 private:
  // Threads share groups of tiles, and the rows' sums of all groups are added in order, so the result is the same for
  // every number of threads.
  static constexpr int64_t kGroups = 128;

  void iteration(bool first) {
    const auto kernel = ON_CPU_TARGET(iterate<X>);
    parallel_for(0, groups, ceil_div(kGrain, group * std::max<int64_t>(B, 1)), [&](int64_t begin, int64_t end) {
      std::vector<CacheLine> p(B * width * sizeof(A) / sizeof(CacheLine)), lane_sums(B);
      const Scratch<A> scratch{width, reinterpret_cast<A*>(p.data()), reinterpret_cast<A*>(lane_sums.data())};
      for (int64_t g = begin; g < end; ++g) {
        kernel(x, B, K, T, first, rows.data(), g * group, std::min((g + 1) * group, K), scratch, bias,
               row_sums.data() + g * B);
      }
    });
  }

  // A row far below the others has hardly any share in the columns' first sums, and its own sum underflows in A. Such a
  // row is computed by itself, now and in later iterations: at |z| = 1e5, where z is rounded to 1 %, the p of one
  // iteration do not give the sum that the next one needs.
  void scale_rows() {
    const auto row_scale = ON_CPU_TARGET(row_scale<X>);
    parallel_rows(B, K, [&](int64_t b) {
      double sum = 0;
      for (int64_t g = 0; g < groups; ++g) sum += row_sums[g * B + b];
      const double inverse_sum = rows[b].inverse_sum / sum;
      const bool shares = rows[b].shift == 0 && inverse_sum > 0x1p-60 && inverse_sum < 0x1p60;
      rows[b] = shares ? RowScale<A>{0, static_cast<A>(inverse_sum)} : row_scale(x + b * K, K, T, bias);
    });
  }

  // The rows' sums are not needed any more.
  void last_iteration() {
    const auto kernel = ON_CPU_TARGET(column_mass<X>);
    std::vector<A> mass(K);
    parallel_columns(B, K, [&](int64_t begin, int64_t end) {
      kernel(x, B, K, T, bias, rows.data(), begin, end, mass.data());
      for (int64_t k = begin; k < end; ++k) {
        if (mass[k] != 0) bias[k] -= std::log(mass[k]);
      }
    });
  }

  const X* x;  // [B, K]
  const int64_t B, K;
  const double T;
  A* bias;  // [K]
  const int64_t width = tile_width(B, sizeof(A));
  const int64_t group = ceil_div(ceil_div(K, kGroups), width) * width;  // columns of a group
  const int64_t groups = ceil_div(K, group);
  std::vector<RowScale<A>> rows;  // [B]
  std::vector<double> row_sums;   // [groups, B]
};

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

Tensor sinkhorn_bias(const Tensor& logits, double temperature, int64_t n_iterations) {
  const int64_t B = logits.size(0), K = logits.size(1);
  Tensor out = torch::stable::new_empty(logits, {K}, accumulation_dtype(logits));
  dispatch(logits, [&]<class X>(const X* x) {
    using A = accumulate_t<X>;
    SinkhornKnopp<X>(x, B, K, temperature, out.mutable_data_ptr<A>()).run(n_iterations);
  });
  return out;
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
  m.impl("sinkhorn_bias", TORCH_BOX(&sinkhorn_bias));
  m.impl("sinkhorn_column_logsumexp", TORCH_BOX(&sinkhorn_column_logsumexp));
  m.impl("sinkhorn_column_mass", TORCH_BOX(&sinkhorn_column_mass));
  m.impl("sinkhorn_assign", TORCH_BOX(&sinkhorn_assign));
}
