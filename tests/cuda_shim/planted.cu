// A correct kernel, and the same with one mistake: what the stand-in must tell apart. Usage: planted BUG
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdio>

enum Bug {
  NONE, GLOBAL_OVERRUN, DYNAMIC_OVERRUN, STATIC_OVERRUN, MISALIGNED_LOAD, MISSING_BARRIER, MISSING_GRID_BARRIER,
  SKIPPED_BARRIER, SKIPPED_SHUFFLE, SKIPPED_GRID_BARRIER, DIVERGENT_BARRIER, MISSING_CLUSTER_BARRIER,
  SKIPPED_CLUSTER_BARRIER, REMOTE_OVERRUN
};
const char* const NAMES[] = {
    "none", "global_overrun", "dynamic_overrun", "static_overrun", "misaligned_load", "missing_barrier",
    "missing_grid_barrier", "skipped_barrier", "skipped_shuffle", "skipped_grid_barrier", "divergent_barrier",
    "missing_cluster_barrier", "skipped_cluster_barrier", "remote_overrun"};

constexpr int THREADS = 64, BLOCKS = 4;

struct alignas(16) Four {
  float value[4];
};

// Every block reverses its part of `in` through dynamic shared memory, adds the sum of its first warp (gathered through
// shuffles and static shared memory), and then adds the first value of the next block.
__global__ void kernel(const float* in, float* out, Bug bug) {
  DYNAMIC_SHARED(float, reversed);
  __shared__ float sum[1];
  const int i = threadIdx.x, first = blockIdx.x * THREADS, last_thread = THREADS - 1;

  const float own = in[first + i + (bug == GLOBAL_OVERRUN)];
  reversed[last_thread - i + (bug == DYNAMIC_OVERRUN)] = own;
  float total = own;
  if (bug == SKIPPED_SHUFFLE && i == 5) return;
  for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
  if (i == 0) sum[bug == STATIC_OVERRUN] = total;
  if (bug == DIVERGENT_BARRIER && i >= 32) {
    __syncthreads();
  } else if (bug != MISSING_BARRIER && !(bug == SKIPPED_BARRIER && i == 3)) {
    __syncthreads();
  }
  out[first + i] = reversed[i] + sum[0];

  if (bug == SKIPPED_GRID_BARRIER && blockIdx.x == 1) return;
  if (bug != MISSING_GRID_BARRIER) cooperative_groups::this_grid().sync();
  const float* next = out + (blockIdx.x + 1) % BLOCKS * THREADS;
  if (i == 1) out[first + i] += next[0];
  if (bug == MISALIGNED_LOAD) out[first + i] = reinterpret_cast<const Four*>(in + 1)->value[0];
}

// Every block hands its values to the next one of its cluster, through that one's shared memory.
__global__ void cluster_kernel(float* values, Bug bug) {
  DYNAMIC_SHARED(float, received);
  const auto cluster = cooperative_groups::this_cluster();
  const int i = threadIdx.x, next = (cluster.block_rank() + 1) % cluster.num_blocks();
  float* own = values + blockIdx.x * THREADS;
  cluster.sync();
  cluster.map_shared_rank(received, next)[i + (bug == REMOTE_OVERRUN)] = own[i];
  if (bug == SKIPPED_CLUSTER_BARRIER && cluster.block_rank() == 1) return;
  if (bug != MISSING_CLUSTER_BARRIER) cluster.sync();
  own[i] = received[i];
}

// Whether clusters of two blocks each turn the outputs of the first kernel by one block, and back.
bool clusters_are_right(float* values, Bug bug) {
  const float before = values[0], of_next = values[THREADS];
  cudaLaunchAttribute cluster{cudaLaunchAttributeClusterDimension, {dim3(2)}};
  const cudaLaunchConfig_t config{dim3(BLOCKS), dim3(THREADS), THREADS * sizeof(float), nullptr, &cluster, 1};
  for (const float expected : {of_next, before}) {
    const cudaError_t status = cudaLaunchKernelEx(&config, cluster_kernel, values, bug);
    if (status != cudaSuccess) return std::puts(cudaGetErrorString(status)), false;
    if (values[0] != expected) return std::puts("the values are wrong"), false;
  }
  return true;
}

int main(int, char** arguments) {
  int bug = 0;
  while (NAMES[bug] != std::string(arguments[1])) ++bug;
  float* in = new float[BLOCKS * THREADS];
  float* out = new float[BLOCKS * THREADS];
  for (int i = 0; i < BLOCKS * THREADS; ++i) in[i] = i, out[i] = NAN;

  Bug kind = Bug(bug);
  void* parameters[] = {&in, &out, &kind};
  const cudaError_t status =
      cudaLaunchCooperativeKernel(kernel, dim3(BLOCKS), dim3(THREADS), parameters, THREADS * sizeof(float), nullptr);
  if (status != cudaSuccess) return std::puts(cudaGetErrorString(status)), 1;

  if (!clusters_are_right(out, kind)) return 1;

  const auto expected = [](int block, int i) {
    const int first = block * THREADS;
    return float(first + THREADS - 1 - i) + 32 * first + 31 * 16;
  };
  for (int block = 0; block < BLOCKS; ++block)
    for (int i = 0; i < THREADS; ++i)
      if (out[block * THREADS + i] != expected(block, i) + (i == 1 ? expected((block + 1) % BLOCKS, 0) : 0))
        return std::puts("the values are wrong"), 1;
  delete[] in;
  delete[] out;
  return std::puts("the values are right"), 0;
}
