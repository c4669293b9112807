// Code of every cuda.cu. Host: launches on PyTorch's current stream, with every return code checked. Device: 16-byte
// loads and stores, warp reductions. Kernels are launched through cudaLaunchKernel, never <<<>>>, so that a C++ compiler
// can build the same files against the host stand-in for the CUDA headers in tests/cuda_shim.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#ifndef DINOV2_CUDA_NAMESPACE  // the tests' stand-in registers the same operators elsewhere
#define DINOV2_CUDA_NAMESPACE dinov2_kernels_cuda
#define DINOV2_CUDA_KEY CUDA
#endif

#define CUDA_CHECK(call)                                                                   \
  do {                                                                                     \
    const cudaError_t status = (call);                                                     \
    STD_TORCH_CHECK(status == cudaSuccess, #call, " failed: ", cudaGetErrorString(status)); \
  } while (false)

namespace dinov2_kernels::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f.operator()<T>() with the C++ type of a floating-point dtype.
template <typename F>
auto dispatch_floating(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double: return f.template operator()<double>();
    case ScalarType::Float: return f.template operator()<float>();
    case ScalarType::BFloat16: return f.template operator()<BFloat16>();
    case ScalarType::Half: return f.template operator()<Half>();
    default: STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16, got ", toString(dtype));
  }
}

// ---------------------------------------------------------------------------------------------------------- launching

#ifdef __CUDACC__
using torch::stable::accelerator::DeviceGuard;

// PyTorch's current stream of a device. Looked up at run time: the CPU build of PyTorch, beside which this file is
// compiled too, has no such symbol.
inline cudaStream_t current_stream(int device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get != nullptr, "this build of PyTorch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "PyTorch gave no CUDA stream for device ", device);
  return static_cast<cudaStream_t>(stream);
}
#else  // under the stand-in there is one device, the CPU
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline cudaStream_t current_stream(int) { return nullptr; }
#endif

// Runs a kernel on the device of `tensor` with `blocks` blocks of `threads` threads; nothing at all for 0 blocks.
template <typename... Params>
void launch(const Tensor& tensor, int64_t blocks, int threads, void (*kernel)(Params...),
            std::type_identity_t<Params>... params) {
  if (blocks == 0) return;
  const int device = tensor.get_device_index();
  const DeviceGuard guard(device);
  void* pointers[] = {&params...};
  CUDA_CHECK(cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), pointers, 0, current_stream(device)));
}

// The same with as many blocks as the device holds at once; they may synchronise across the grid.
template <typename... Params>
void launch_cooperative(const Tensor& tensor, int threads, void (*kernel)(Params...),
                        std::type_identity_t<Params>... params) {
  const int device = tensor.get_device_index();
  const DeviceGuard guard(device);
  int processors = 0, blocks = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0));
  void* pointers[] = {&params...};
  CUDA_CHECK(cudaLaunchCooperativeKernel(kernel, dim3(processors * blocks), dim3(threads), pointers, 0,
                                         current_stream(device)));
}

// Clusters: `size` neighbouring blocks that run at the same time, wait for each other and write to each other's shared
// memory. They need compute capability 9.0 or higher, and kernels with machine code for it.
template <typename Kernel>
class ClusterLauncher {
 public:
  // For kernels with `shared_bytes` of dynamic shared memory, on the device of `tensor`.
  ClusterLauncher(const Tensor& tensor, Kernel* kernel, int size, int threads, size_t shared_bytes)
      : kernel_(kernel), size_(size), threads_(threads), shared_bytes_(shared_bytes),
        device_(tensor.get_device_index()), guard_(device_) {
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    if (attributes.ptxVersion < 90) return;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));  // more than 8 blocks
    const auto one = config(1);
    CUDA_CHECK(cudaOccupancyMaxActiveClusters(&at_once_, kernel, &one));
  }

  // Number of clusters that the device holds at once: 0 if it has no clusters, or cannot hold one of this size.
  int at_once() const { return at_once_; }

  // Launches nothing for 0 clusters.
  template <typename... Params>
  void launch(int64_t clusters, Params... params) {
    if (clusters == 0) return;
    const auto all = config(clusters);
    CUDA_CHECK(cudaLaunchKernelEx(&all, kernel_, params...));
  }

 private:
  cudaLaunchConfig_t config(int64_t clusters) {
    return {dim3(clusters * size_), dim3(threads_), shared_bytes_, current_stream(device_), &attribute_, 1};
  }

  Kernel* kernel_;
  int size_, threads_;
  size_t shared_bytes_;
  int device_, at_once_ = 0;
  DeviceGuard guard_;
  cudaLaunchAttribute attribute_ = cluster_attribute(size_);

  static cudaLaunchAttribute cluster_attribute(int size) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(size), 1, 1};
    return attribute;
  }
};

// ----------------------------------------------------------------------------------------------------- on the device

#ifdef __CUDACC__
// An array of T in dynamic shared memory.
#define DYNAMIC_SHARED(T, name)                                  \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared)
#endif

constexpr int WARP = 32;

template <typename T>
constexpr int PER_LOAD = 16 / sizeof(T);  // values in a 16-byte load

// N neighbouring values with the type they have in memory; kernels convert each value when they use it.
template <typename T, int N>
struct alignas(16) Pack {
  T value[N];
};

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The N values of a row of `length` from `start` on; `fill` past the end. Set `aligned` if the row starts on a 16-byte
// boundary and its length is a multiple of N.
template <int N, typename T>
__device__ Pack<T, N> load(const T* row, int64_t start, int64_t length, bool aligned, T fill) {
  if (aligned && start < length) return *reinterpret_cast<const Pack<T, N>*>(row + start);
  Pack<T, N> pack;
  for (int i = 0; i < N; ++i) pack.value[i] = start + i < length ? row[start + i] : fill;
  return pack;
}

template <typename T, int N>
__device__ void store(T* row, const Pack<T, N>& pack, int64_t start, int64_t length, bool aligned) {
  if (aligned && start < length) {
    *reinterpret_cast<Pack<T, N>*>(row + start) = pack;
  } else {
    for (int i = 0; i < N; ++i)
      if (start + i < length) row[start + i] = pack.value[i];
  }
}

// A running sum of exponentials: sum = sum_i exp((z_i - max) * scale) over the z_i seen so far.
template <typename A>
struct ExpSum {
  A max, sum;

  // The empty sum. Its maximum is the lowest finite number, because -infinity would give exp(-infinity + infinity).
  static __device__ ExpSum empty() { return {std::numeric_limits<A>::lowest(), 0}; }

  template <int N>
  __device__ void add(const A (&z)[N], A scale) {
    A larger = max;
    for (int i = 0; i < N; ++i) larger = std::fmax(larger, z[i]);
    sum *= std::exp((max - larger) * scale);
    for (int i = 0; i < N; ++i) sum += std::exp((z[i] - larger) * scale);
    max = larger;
  }

  __device__ void merge(const ExpSum& other, A scale) {
    const A larger = std::fmax(max, other.max);
    sum = sum * std::exp((max - larger) * scale) + other.sum * std::exp((other.max - larger) * scale);
    max = larger;
  }
};

// The largest value of a warp's lanes, in every lane.
template <typename A>
__device__ A warp_max(A value) {
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    value = std::fmax(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}

// The sum of a warp's lanes, in every lane.
template <typename A>
__device__ A warp_sum(A value) {
  for (int distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// The merged sums of a warp's lanes, in every lane.
template <typename A>
__device__ ExpSum<A> warp_merge(const ExpSum<A>& own) {
  const A larger = warp_max(own.max);
  return {larger, warp_sum(own.sum * std::exp(own.max - larger))};
}

}  // namespace dinov2_kernels::cuda
