// Sinkhorn's kernels without clusters, down columns and along rows; see cuda.cu.
//
// A *column tile* is 32 lanes x 16 bytes of neighbouring columns with all rows: a block's warps take the rows in turns
// and combine their sums in shared memory. A whole block reads a *row*.
#pragma once

#include "common/cuda.h"

namespace dinov2_kernels::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int ROWS = 4;  // rows that a thread reads at once: 64 bytes

template <typename A>
constexpr int BLOCKS = sizeof(A) == 8 ? 2 : 3;  // blocks on a multiprocessor: leaves 128 or 80 registers to a thread
template <typename T>
constexpr int TILE = WARP * PER_LOAD<T>;  // columns of a column tile

// N neighbouring logits of row b; -infinity, which adds nothing to any sum, from row B or column `end` on.
template <typename T>
__device__ Pack<T, PER_LOAD<T>> load_logits(const T* logits, int64_t b, int64_t k, int64_t B, int64_t end, int64_t K,
                                            bool aligned) {
  return load<PER_LOAD<T>>(logits + b * K, k, b < B ? end : 0, aligned, T(-std::numeric_limits<float>::infinity()));
}

// Goes over the rows of a column tile: f(b, x) gets the lane's columns x[r].value[i] of ROWS rows from b on.
template <typename T, typename F>
__device__ void for_rows_of_tile(const T* logits, int64_t column, int64_t B, int64_t K, bool aligned, const F& f) {
  for (int64_t b = threadIdx.x / WARP * ROWS; b < B; b += WARPS * ROWS) {
    Pack<T, PER_LOAD<T>> x[ROWS];
    for (int r = 0; r < ROWS; ++r) x[r] = load_logits(logits, b + r, column, B, K, K, aligned);
    f(b, x);
  }
}

template <typename T, typename A = Accumulate<T>>
__global__ void __launch_bounds__(THREADS, BLOCKS<A>)
    column_logsumexp_kernel(const T* logits, int64_t B, int64_t K, bool aligned, A scale, A* out) {
  constexpr int N = PER_LOAD<T>;
  __shared__ ExpSum<A> shared[WARPS][TILE<T>];  // slot i * WARP + lane: the lane's i-th column
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t first = blockIdx.x * int64_t(TILE<T>);

  ExpSum<A> own[N];
  for (auto& sum : own) sum = ExpSum<A>::empty();
  for_rows_of_tile(logits, first + lane * N, B, K, aligned, [&](int64_t, const Pack<T, N>* x) {
    for (int i = 0; i < N; ++i) {
      // The maximum is that of the logits, not of x / T: x - maximum is small, and nearly exact, where it matters.
      A column[ROWS];
      for (int r = 0; r < ROWS; ++r) column[r] = x[r].value[i];
      own[i].add(column, scale);
    }
  });
  for (int i = 0; i < N; ++i) shared[warp][i * WARP + lane] = own[i];
  __syncthreads();

  for (int slot = threadIdx.x; slot < TILE<T>; slot += THREADS) {
    const int64_t k = first + slot % WARP * N + slot / WARP;
    auto total = ExpSum<A>::empty();
    for (int w = 0; w < WARPS; ++w) total.merge(shared[w][slot], scale);
    if (k < K) out[k] = total.max * scale + std::log(total.sum);
  }
}

// The maximum and the sum of exponentials of z_bk = x_bk * scale + bias_k over the columns of R rows from b on, in every
// thread of the block. R rows share a read of the bias.
template <int R, typename T, typename A = Accumulate<T>>
__device__ void softmax_norm(ExpSum<A> (&norm)[R], const T* logits, const A* bias, int64_t b, int64_t B, int64_t K,
                             bool aligned, A scale) {
  constexpr int N = PER_LOAD<T>;
  __shared__ ExpSum<A> shared[R][WARPS];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

  for (auto& sum : norm) sum = ExpSum<A>::empty();
#pragma unroll(4 / R)
  for (int64_t k = threadIdx.x * N; k < K; k += THREADS * N) {
    const auto offset = load<N>(bias, k, K, aligned, A(0));
    for (int r = 0; r < R; ++r) {
      const auto x = load_logits(logits, b + r, k, B, K, K, aligned);
      A z[N];
      for (int i = 0; i < N; ++i) z[i] = std::fma(A(x.value[i]), scale, offset.value[i]);
      norm[r].add(z, A(1));
    }
  }
  for (int r = 0; r < R; ++r) {
    norm[r] = warp_merge(norm[r]);
    if (lane == 0) shared[r][warp] = norm[r];
  }
  __syncthreads();
  for (int r = 0; r < R; ++r) norm[r] = warp_merge(lane < WARPS ? shared[r][lane] : ExpSum<A>::empty());
  __syncthreads();  // the next rows write to shared again
}

template <int R, typename T, typename A = Accumulate<T>>
__device__ void write_softmax_norms(ExpSum<A>* norms, const T* logits, const A* bias, int64_t B, int64_t K,
                                    bool aligned, A scale) {
  for (int64_t b = blockIdx.x * int64_t(R); b < B; b += gridDim.x * int64_t(R)) {
    ExpSum<A> norm[R];
    softmax_norm(norm, logits, bias, b, B, K, aligned, scale);
    for (int r = 0; r < R; ++r)
      if (threadIdx.x == 0 && b + r < B) norms[b + r] = norm[r];
  }
}

template <typename T, typename A = Accumulate<T>>
__global__ void __launch_bounds__(THREADS, BLOCKS<A>)
    column_mass_kernel(const T* logits, const A* bias, int64_t B, int64_t K, bool aligned, A scale,
                       ExpSum<A>* norms /* [B], scratch */, A* mass) {
  constexpr int N = PER_LOAD<T>;
  __shared__ A shared[WARPS][TILE<T>];  // slot i * WARP + lane: the lane's i-th column
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

  if (B < ROWS * int64_t(gridDim.x)) {  // few rows: spread them over all blocks
    write_softmax_norms<1>(norms, logits, bias, B, K, aligned, scale);
  } else {
    write_softmax_norms<ROWS>(norms, logits, bias, B, K, aligned, scale);
  }
  cooperative_groups::this_grid().sync();

  for (int64_t first = blockIdx.x * int64_t(TILE<T>); first < K; first += gridDim.x * int64_t(TILE<T>)) {
    A own[N] = {};
    const auto offset = load<N>(bias, first + lane * N, K, aligned, A(0));
    for_rows_of_tile(logits, first + lane * N, B, K, aligned, [&](int64_t b, const Pack<T, N>* x) {
      for (int r = 0; r < ROWS && b + r < B; ++r) {
        const A max = norms[b + r].max, inverse = 1 / norms[b + r].sum;
        for (int i = 0; i < N; ++i)
          own[i] += std::exp(std::fma(A(x[r].value[i]), scale, offset.value[i]) - max) * inverse;
      }
    });
    for (int i = 0; i < N; ++i) shared[warp][i * WARP + lane] = own[i];
    __syncthreads();
    for (int slot = threadIdx.x; slot < TILE<T>; slot += THREADS) {
      const int64_t k = first + slot % WARP * N + slot / WARP;
      A total = 0;
      for (int w = 0; w < WARPS; ++w) total += shared[w][slot];
      if (k < K) mass[k] = total;
    }
    __syncthreads();  // the next tile writes to shared again
  }
}

template <typename T, typename A = Accumulate<T>>
__global__ void __launch_bounds__(THREADS, BLOCKS<A>)
    assign_kernel(const T* logits, const A* bias, int64_t B, int64_t K, bool aligned, A scale, A* out) {
  constexpr int N = PER_LOAD<T>;
  const int64_t b = blockIdx.x;
  ExpSum<A> norm[1];
  softmax_norm(norm, logits, bias, b, B, K, aligned, scale);
  const A inverse = 1 / norm[0].sum;
  for (int64_t k = threadIdx.x * N; k < K; k += THREADS * N) {
    const auto x = load_logits(logits, b, k, B, K, K, aligned);
    const auto offset = load<N>(bias, k, K, aligned, A(0));
    Pack<A, N> p;
    for (int i = 0; i < N; ++i)
      p.value[i] = std::exp(std::fma(A(x.value[i]), scale, offset.value[i]) - norm[0].max) * inverse;
    store(out + b * K, p, k, K, aligned);
  }
}

}  // namespace
}  // namespace dinov2_kernels::cuda
