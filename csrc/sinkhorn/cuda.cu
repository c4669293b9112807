// Sinkhorn-Knopp in CUDA C++: the operators that dinov2_kernels/sinkhorn/reference.py defines.
//
// Legend: logits [B, K] of type T (double, float, BFloat16, Half), contiguous; bias [K] and every result of type A, the
// type of sums (double for double, float otherwise); scale = 1 / temperature. No atomics: results are the same in every
// run.
#include <algorithm>

#include "common/cuda.h"
#include "sinkhorn/cuda_clusters.h"
#include "sinkhorn/cuda_kernels.h"

namespace dinov2_kernels::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------------- vectors

// The sum over P of parts [P, K], at column k.
template <typename A>
__device__ A sum_of_parts(const A* parts, int64_t P, int64_t K, int64_t k) {
  A total = 0;
#pragma unroll 8
  for (int64_t p = 0; p < P; ++p) total += parts[p * K + k];
  return total;
}

// reference.zero_if_empty
template <typename A>
__device__ A zero_if_empty(A log_mass) {
  return log_mass == -std::numeric_limits<A>::infinity() ? A(0) : log_mass;
}

template <typename A>
__global__ void __launch_bounds__(THREADS) sum_kernel(const A* parts, int64_t P, int64_t K, A* mass) {
  const int64_t k = blockIdx.x * int64_t(THREADS) + threadIdx.x;
  if (k < K) mass[k] = sum_of_parts(parts, P, K, k);
}

template <typename A>
__global__ void __launch_bounds__(THREADS) first_bias_kernel(int64_t K, A* logsumexp_to_bias) {
  const int64_t k = blockIdx.x * int64_t(THREADS) + threadIdx.x;
  if (k < K) logsumexp_to_bias[k] = -zero_if_empty(logsumexp_to_bias[k]);
}

template <typename A>
__global__ void __launch_bounds__(THREADS) next_bias_kernel(const A* parts, int64_t P, int64_t K, A* bias) {
  const int64_t k = blockIdx.x * int64_t(THREADS) + threadIdx.x;
  if (k < K) bias[k] -= zero_if_empty(std::log(sum_of_parts(parts, P, K, k)));
}
// ------------------------------------------------------------------------------------------------------- the operators

Tensor new_empty(const Tensor& logits, std::initializer_list<int64_t> sizes) {
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(logits, sizes, is_double ? ScalarType::Double : ScalarType::Float);
}

// Whether every row and the bias start on a 16-byte boundary and hold a whole number of 16-byte loads.
bool is_aligned(const Tensor& logits, const void* bias) {
  const int64_t row_bytes = logits.size(1) * logits.element_size();
  return row_bytes % 16 == 0 && cuda::is_aligned(logits.data_ptr()) && cuda::is_aligned(bias);
}

// Bytes: one read of the logits, one write of [K].
Tensor column_logsumexp(const Tensor& logits, double temperature) {
  const int64_t B = logits.size(0), K = logits.size(1);
  Tensor out = new_empty(logits, {K});
  dispatch_floating(logits.scalar_type(), [&]<typename T>() {
    using A = Accumulate<T>;
    launch(logits, (K + TILE<T> - 1) / TILE<T>, THREADS, column_logsumexp_kernel<T>,
           static_cast<const T*>(logits.data_ptr()), B, K, is_aligned(logits, nullptr), A(1 / temperature),
           static_cast<A*>(out.data_ptr()));
  });
  return out;
}

// Parts [P, K] whose sum is the mass.
//
// Bytes, in clusters: one read of the logits, one write of a part [K] for each cluster that the device holds at once. For
// 65536 BFloat16 columns on an H100, these are 32 clusters and 8 MB.
// Without clusters, or if a row is too long for one: two reads of the logits (the second from L2 if they fit: the class
// tokens, [128, 65536] BFloat16, are 17 MB), B / 4 reads of the bias (B for few rows) from L2, [K] and [2, B].
Tensor mass_in_parts(const Tensor& logits, double temperature, const Tensor& bias) {
  const int64_t B = logits.size(0), K = logits.size(1);
  return dispatch_floating(logits.scalar_type(), [&]<typename T>() {
    using A = Accumulate<T>;
    const auto* x = static_cast<const T*>(logits.data_ptr());
    const auto* offset = static_cast<const A*>(bias.data_ptr());
    const bool aligned = is_aligned(logits, offset);
    int blocks = 1;
    while (blocks * MAX_SLICE<T> < K && blocks <= MAX_CLUSTER) blocks *= 2;
    if (aligned && blocks <= MAX_CLUSTER) {
      ClusterLauncher clusters(logits, cluster_mass_kernel<T>, blocks, THREADS, sizeof(ClusterShared<T>));
      if (clusters.at_once() > 0) {
        const int64_t count = std::min<int64_t>(clusters.at_once(), (B + CLUSTER_ROWS - 1) / CLUSTER_ROWS);
        const int64_t loads = (K + PER_LOAD<T> - 1) / PER_LOAD<T>, slice = (loads + blocks - 1) / blocks * PER_LOAD<T>;
        Tensor parts = new_empty(logits, {count, K});
        clusters.launch(count, x, offset, B, K, slice, A(1 / temperature), static_cast<A*>(parts.data_ptr()));
        return parts;
      }
    }
    Tensor norms = new_empty(logits, {B, 2}), mass = new_empty(logits, {1, K});
    launch_cooperative(logits, THREADS, column_mass_kernel<T>, x, offset, B, K, aligned, A(1 / temperature),
                       static_cast<ExpSum<A>*>(norms.data_ptr()), static_cast<A*>(mass.data_ptr()));
    return mass;
  });
}

Tensor column_mass(const Tensor& logits, double temperature, const Tensor& bias) {
  const int64_t K = logits.size(1);
  const Tensor parts = mass_in_parts(logits, temperature, bias);
  Tensor mass = new_empty(logits, {K});
  dispatch_floating(logits.scalar_type(), [&]<typename T>() {
    using A = Accumulate<T>;
    launch(logits, (K + THREADS - 1) / THREADS, THREADS, sum_kernel<A>, static_cast<const A*>(parts.data_ptr()),
           parts.size(0), K, static_cast<A*>(mass.data_ptr()));
  });
  return mass;
}

// Bytes: those of column_logsumexp, and of mass_in_parts for every later iteration.
Tensor sinkhorn_bias(const Tensor& logits, double temperature, int64_t n_iterations) {
  const int64_t K = logits.size(1), blocks = (K + THREADS - 1) / THREADS;
  Tensor bias = column_logsumexp(logits, temperature);
  dispatch_floating(logits.scalar_type(), [&]<typename T>() {
    using A = Accumulate<T>;
    A* const values = static_cast<A*>(bias.data_ptr());
    launch(logits, blocks, THREADS, first_bias_kernel<A>, K, values);
    for (int64_t i = 1; i < n_iterations; ++i) {
      const Tensor parts = mass_in_parts(logits, temperature, bias);
      launch(logits, blocks, THREADS, next_bias_kernel<A>, static_cast<const A*>(parts.data_ptr()), parts.size(0), K,
             values);
    }
  });
  return bias;
}

// Bytes: two reads of the logits (a block reads its row twice, the second time from L2), one write of [B, K].
Tensor assign(const Tensor& logits, double temperature, const Tensor& bias) {
  const int64_t B = logits.size(0), K = logits.size(1);
  Tensor out = new_empty(logits, {B, K});
  dispatch_floating(logits.scalar_type(), [&]<typename T>() {
    using A = Accumulate<T>;
    launch(logits, B, THREADS, assign_kernel<T>, static_cast<const T*>(logits.data_ptr()),
           static_cast<const A*>(bias.data_ptr()), B, K, is_aligned(logits, bias.data_ptr()), A(1 / temperature),
           static_cast<A*>(out.data_ptr()));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DINOV2_CUDA_NAMESPACE, DINOV2_CUDA_KEY, m) {
  m.impl("sinkhorn_bias", TORCH_BOX(&sinkhorn_bias));
  m.impl("sinkhorn_column_logsumexp", TORCH_BOX(&column_logsumexp));
  m.impl("sinkhorn_column_mass", TORCH_BOX(&column_mass));
  m.impl("sinkhorn_assign", TORCH_BOX(&assign));
}

}  // namespace dinov2_kernels::cuda
