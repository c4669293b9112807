// The mass for rows that are spread over a cluster of blocks. The blocks hold a row until they know its norm, so they
// need not read it again; see cuda.cu. Needs compute capability 9.0 or higher.
#pragma once

#include <algorithm>

#include "common/cuda.h"
#include "sinkhorn/cuda_kernels.h"

namespace dinov2_kernels::cuda {
namespace {

constexpr int ROW_LOADS = 4;       // loads of 16 bytes of a thread, for its part of a row
constexpr int CLUSTER_ROWS = 2;    // rows in a cluster at once: a thread then loads 128 bytes at a time
constexpr int MAX_CLUSTER = 16;    // blocks, with 8192 bfloat16 columns each
constexpr int CLUSTER_BLOCKS = 2;  // blocks on a multiprocessor: while one waits for its cluster, the other reads

template <typename T>
constexpr int64_t MAX_SLICE = int64_t(THREADS) * ROW_LOADS * PER_LOAD<T>;  // columns of a row that a block can hold

// Dynamic shared memory of a block. A thread's loads of 16 bytes are THREADS apart, so there are no bank conflicts.
template <typename T, typename A = Accumulate<T>>
struct ClusterShared {
  static constexpr int PACK = 16 / sizeof(A), PACKS = PER_LOAD<T> / PACK;

  Pack<A, PACK> bias[ROW_LOADS][PACKS][THREADS], mass[ROW_LOADS][PACKS][THREADS];
  ExpSum<A> norms[2][CLUSTER_ROWS][MAX_CLUSTER * WARPS];  // for each warp of the cluster; this step and the last one
};

// A cluster takes CLUSTER_ROWS rows at a time; each block holds a slice of their columns in registers, from the load to
// the last sum. Writes the share of each cluster's rows in the mass: parts [clusters, K].
template <typename T, typename A = Accumulate<T>>
__global__ void __launch_bounds__(THREADS, CLUSTER_BLOCKS)
    cluster_mass_kernel(const T* logits, const A* bias, int64_t B, int64_t K, int64_t slice, A scale, A* parts) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Shared = ClusterShared<T>;
  constexpr int N = PER_LOAD<T>, PACK = Shared::PACK, PACKS = Shared::PACKS;
  DYNAMIC_SHARED(Shared, shared);
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t number = blockIdx.x / blocks, clusters = gridDim.x / blocks;  // this cluster's number; number of all
  const int64_t begin = rank * slice;  // first column of the block
  const int width = std::min(slice, K - begin);
  const auto column = [](int c) { return int(c * THREADS + threadIdx.x) * N; };  // of a load, relative to `begin`

  for (int c = 0; c < ROW_LOADS; ++c) {
    const auto offset = load<N>(bias + begin, column(c), width, true, A(0));
    for (int i = 0; i < N; ++i) {
      shared->bias[c][i / PACK][threadIdx.x].value[i % PACK] = offset.value[i];
      shared->mass[c][i / PACK][threadIdx.x].value[i % PACK] = 0;
    }
  }
  cluster.sync();  // now all its blocks run, and their shared memory can be written

  int parity = 0;
  for (int64_t b = number * CLUSTER_ROWS; b < B; b += clusters * CLUSTER_ROWS, parity ^= 1) {
    Pack<T, N> x[CLUSTER_ROWS][ROW_LOADS];
#pragma unroll
    for (int r = 0; r < CLUSTER_ROWS; ++r)
      for (int c = 0; c < ROW_LOADS; ++c)
        x[r][c] = load_logits(logits + begin, b + r, column(c), B, width, K, true);

    A z[CLUSTER_ROWS][ROW_LOADS][N];
#pragma unroll
    for (int c = 0; c < ROW_LOADS; ++c)
      for (int p = 0; p < PACKS; ++p) {
        const auto offset = shared->bias[c][p][threadIdx.x];
        for (int r = 0; r < CLUSTER_ROWS; ++r)
          for (int i = 0; i < PACK; ++i)
            z[r][c][p * PACK + i] = std::fma(A(x[r][c].value[p * PACK + i]), scale, offset.value[i]);
      }

#pragma unroll  // keeps z in registers
    for (int r = 0; r < CLUSTER_ROWS; ++r) {
      auto own = ExpSum<A>::empty();  // sum of the warp; z becomes exp(z - own.max)
#pragma unroll
      for (int c = 0; c < ROW_LOADS; ++c)
        for (const A value : z[r][c]) own.max = std::fmax(own.max, value);
      own.max = warp_max(own.max);
#pragma unroll
      for (int c = 0; c < ROW_LOADS; ++c)
        for (A& value : z[r][c]) own.sum += value = std::exp(value - own.max);
      own.sum = warp_sum(own.sum);
      if (lane < blocks) cluster.map_shared_rank(shared->norms[parity][r], lane)[rank * WARPS + warp] = own;
    }
    cluster.sync();

    A share[CLUSTER_ROWS];  // z * share = p
#pragma unroll
    for (int r = 0; r < CLUSTER_ROWS; ++r) {
      auto norm = ExpSum<A>::empty();
#pragma unroll 1
      for (int i = lane; i < blocks * WARPS; i += WARP) norm.merge(shared->norms[parity][r][i], A(1));
      norm = warp_merge(norm);
      share[r] = b + r < B ? std::exp(shared->norms[parity][r][rank * WARPS + warp].max - norm.max) / norm.sum : 0;
    }
#pragma unroll
    for (int c = 0; c < ROW_LOADS; ++c)
      for (int p = 0; p < PACKS; ++p) {
        auto mass = shared->mass[c][p][threadIdx.x];
        for (int r = 0; r < CLUSTER_ROWS; ++r)
          for (int i = 0; i < PACK; ++i) mass.value[i] += z[r][c][p * PACK + i] * share[r];
        shared->mass[c][p][threadIdx.x] = mass;
      }
  }

  for (int c = 0; c < ROW_LOADS; ++c) {
    Pack<A, N> mass;
    for (int i = 0; i < N; ++i) mass.value[i] = shared->mass[c][i / PACK][threadIdx.x].value[i % PACK];
    store(parts + number * K + begin, mass, column(c), width, true);
  }
#endif
}

}  // namespace
}  // namespace dinov2_kernels::cuda
