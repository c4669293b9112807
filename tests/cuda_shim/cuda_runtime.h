// A stand-in for the CUDA runtime: with it a C++ compiler builds csrc/*/cuda.cu and the CPU runs the kernels, so that
// their values and memory accesses are tested where there is no GPU.
//
//     g++ -x c++ -std=c++20 -I tests/cuda_shim -I csrc ... csrc/sinkhorn/cuda.cu
//
// It holds the subset of CUDA that our kernels use. A block is an operating-system thread, so that `__shared__` can be
// `thread_local`; a thread of the block is a fiber, run until it waits at a barrier or a shuffle. One fiber of one block
// runs at a time, and a warp as far as it gets without the others, in the order of their numbers, or backwards where
// CUDA_SHIM_ORDER=reverse: a kernel that lacks a barrier gives wrong values in one of the two orders, on every run. A
// barrier that some thread never reaches fails the launch, naming the lines where the threads wait; it does not hang.
//
// Built with -fsanitize=address,bounds,alignment: AddressSanitizer watches global and dynamic shared memory, the bounds
// checker static shared arrays, the alignment checker vector loads. Not modelled: timing, caches, the accuracy of
// approximate intrinsics.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <semaphore>
#include <source_location>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  int64_t volume() const { return int64_t(x) * y * z; }
  dim3 position(int64_t i) const { return {unsigned(i % x), unsigned(i / x % y), unsigned(i / x / y)}; }
};

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };

namespace cuda_shim {

constexpr int WARP = 32, MAX_THREADS = 1024, MAX_SHARED_BYTES = 227 * 1024;
constexpr int MAX_STATIC_SHARED_BYTES = 48 * 1024, PORTABLE_CLUSTER = 8;  // a kernel's attributes allow it more
constexpr int PROCESSORS = 2, BLOCKS_PER_PROCESSOR = 2, CLUSTERS = 2;  // what the occupancy queries answer
constexpr size_t STACK_BYTES = 64 * 1024;

inline bool reverse_order() {
  const char* order = std::getenv("CUDA_SHIM_ORDER");
  return order && order == std::string("reverse");
}

// A place where execution stopped, with a stack of its own.
#if defined(__x86_64__)
class Context {
 public:
  // `entry` begins there once it is gone to.
  void begin(char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where `entry` would return to
    *--top = reinterpret_cast<void*>(entry);
    top_ = top - 6;  // the registers
  }

  // Stops here, and goes on there. swapcontext does the same, but asks the kernel twice for the mask of signals, which
  // takes most of the time of a test.
  static void go(Context& here, const Context& there) { swap(&here.top_, there.top_); }

 private:
  __attribute__((naked, noinline)) static void swap(void*** here, void** there) {
    asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
        "mov %rsp, (%rdi); mov %rsi, %rsp\n"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
  }

  void** top_ = nullptr;  // of the stack, where a function's registers lie and the address that it returns to
};
#else
class Context {
 public:
  void begin(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    makecontext(&context_, entry, 0);
  }

  static void go(Context& here, const Context& there) { swapcontext(&here.context_, &there.context_); }

 private:
  ucontext_t context_;
};
#endif

enum State { READY, AT_WARP, AT_BLOCK, AT_CLUSTER, AT_GRID, FINISHED };
const char* const BARRIERS[] = {"", "a warp barrier or shuffle", "__syncthreads", "the cluster barrier",
                                "the grid barrier"};  // where a thread in such a state waits

// A CUDA thread.
struct Fiber {
  dim3 index;
  State state = READY;
  std::source_location where;  // the barrier it waits at
  unsigned mask = 0;           // the lanes that meet at a warp's barrier
  uint64_t offer[2] = {};      // to other lanes in a shuffle; two, as a fast lane may be one shuffle ahead
  int shuffles = 0;
  Context context;
  std::unique_ptr<char[]> stack;
};

class Block {
 public:
  dim3 index, size, grid;
  std::unique_ptr<char[]> dynamic_shared;
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  std::string error;  // why the block cannot go on
  const std::vector<std::unique_ptr<Block>>& together;  // the blocks of its cluster, or of its grid; itself as well

  Block(dim3 index, dim3 size, dim3 grid, size_t shared_bytes, const std::vector<std::unique_ptr<Block>>& together,
        std::function<void()> kernel)
      : index(index), size(size), grid(grid), dynamic_shared(new char[shared_bytes]), fibers(size.volume()),
        together(together), kernel_(std::move(kernel)), thread_([this] { serve(); }) {
    std::memset(dynamic_shared.get(), 0xff, shared_bytes);  // NaN
  }

  ~Block() {
    stop_ = true;
    resume_.release();
    thread_.join();
  }

  // Runs the block until all its threads have finished, or all wait for other blocks, or none can go on (`error`).
  void run() {
    resume_.release();
    paused_.acquire();
  }

  bool all(State state) const {
    return std::all_of(fibers.begin(), fibers.end(), [&](const Fiber& f) { return f.state == state; });
  }

  // Called by the running fiber: lets others run until the barrier opens.
  void wait(State state, std::source_location where, unsigned mask = 0) {
    running->state = state, running->where = where, running->mask = mask;
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(state == FINISHED ? nullptr : &fake_stack, stack_, stack_size_);
    Context::go(running->context, scheduler_);
    __sanitizer_finish_switch_fiber(fake_stack, &stack_, &stack_size_);
  }

  Fiber& lane(unsigned number) { return fibers[(running - fibers.data()) / WARP * WARP + number]; }

  static thread_local Block* current;

 private:
  void serve() {
    current = this;
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[i];
      fiber.index = size.position(i);
      fiber.stack.reset(new char[STACK_BYTES]);
      fiber.context.begin(fiber.stack.get(), STACK_BYTES, &Block::enter);
    }
    for (resume_.acquire(); !stop_; resume_.acquire()) {
      for (Fiber& fiber : fibers) fiber.state = READY;  // at the start, or past a barrier of several blocks
      schedule();
      paused_.release();
    }
  }

  static void enter() {
    __sanitizer_finish_switch_fiber(nullptr, &current->stack_, &current->stack_size_);
    current->kernel_();
    current->wait(FINISHED, {});
  }

  void schedule() {
    std::vector<Fiber*> everyone;
    for (Fiber& fiber : fibers) everyone.push_back(&fiber);
    if (reverse_order()) std::reverse(everyone.begin(), everyone.end());
    do {
      for (size_t i = 0; i < everyone.size(); i += WARP)
        run_warp({everyone.begin() + i, everyone.begin() + std::min(i + WARP, everyone.size())});
    } while (open(AT_BLOCK, everyone));
    if (!all(FINISHED) && !all(AT_CLUSTER) && !all(AT_GRID)) error = describe();
  }

  // Runs a warp as far as it gets without the others: what it must not do before them, it does before them.
  void run_warp(const std::vector<Fiber*>& warp) {
    bool opened = true;
    while (opened) {
      for (Fiber* fiber : warp)
        if (fiber->state == READY) switch_to(*(running = fiber));
      opened = false;
      for (const Fiber* fiber : warp) {
        if (fiber->state != AT_WARP) continue;
        std::vector<Fiber*> members;
        for (Fiber* f : warp)
          if (fiber->mask >> (f - fibers.data()) % WARP & 1) members.push_back(f);
        opened |= open(AT_WARP, members);
      }
    }
  }

  void switch_to(Fiber& fiber) {
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), STACK_BYTES);
    Context::go(scheduler_, fiber.context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  // Opens a barrier if all its threads have reached it.
  static bool open(State state, const std::vector<Fiber*>& members) {
    for (const Fiber* f : members)
      if (f->state != state || f->mask != members[0]->mask || f->where.line() != members[0]->where.line()) return false;
    for (Fiber* f : members) f->state = READY;
    return true;
  }

  std::string describe() const {
    std::map<std::string, size_t> first;  // thread in each situation
    for (size_t i = 0; i < fibers.size(); ++i) {
      const Fiber& f = fibers[i];
      const std::string line = std::string(f.where.file_name()) + ":" + std::to_string(f.where.line());
      first.emplace(f.state == FINISHED ? "has finished" : "waits at " + (BARRIERS[f.state] + (" in " + line)), i);
    }
    std::string text = "deadlock in block " + std::to_string(index.x);
    for (const auto& [situation, i] : first) text += "; thread " + std::to_string(i) + " " + situation;
    return text;
  }

  std::function<void()> kernel_;
  Context scheduler_;
  const void* stack_ = nullptr;  // of the scheduler
  size_t stack_size_ = 0;
  bool stop_ = false;
  std::binary_semaphore resume_{0}, paused_{0};
  std::thread thread_;
};
inline thread_local Block* Block::current = nullptr;

// --------------------------------------------------------------------------------------------------------------- launch

inline thread_local std::string last_error;

inline cudaError_t run_together(std::vector<std::unique_ptr<Block>>& blocks) {
  const bool reverse = reverse_order();
  while (true) {
    for (size_t i = 0; i < blocks.size(); ++i) {
      Block& block = *blocks[reverse ? blocks.size() - 1 - i : i];
      block.run();
      if (!(last_error = block.error).empty()) return cudaErrorLaunchFailure;
    }
    const auto finished = std::count_if(blocks.begin(), blocks.end(), [](auto& b) { return b->all(FINISHED); });
    if (size_t(finished) == blocks.size()) return cudaSuccess;
    if (finished > 0) {
      const auto waiting = std::find_if(blocks.begin(), blocks.end(), [](auto& b) { return !b->all(FINISHED); });
      const std::string barrier = BARRIERS[(*waiting)->fibers[0].state];
      last_error = "deadlock: some blocks wait at " + barrier + ", others have finished";
      return cudaErrorLaunchFailure;
    }
  }
}

// What cudaFuncSetAttribute allowed each kernel; the limits without it where there is no entry.
inline std::map<const void*, size_t> shared_bytes_allowed;
inline std::map<const void*, int> cluster_allowed;

// `together` blocks at a time run side by side and may wait for each other.
template <typename... P>
cudaError_t launch(int64_t together, void (*kernel)(P...), dim3 grid, dim3 size, void** arguments,
                   size_t shared_bytes) {
  const int64_t count = grid.volume(), threads = size.volume();
  const auto allowed = shared_bytes_allowed.find(reinterpret_cast<const void*>(kernel));
  if (count < 1 || count % together != 0 || threads < 1 || threads > MAX_THREADS || threads % WARP != 0 ||
      shared_bytes > (allowed == shared_bytes_allowed.end() ? MAX_STATIC_SHARED_BYTES : allowed->second)) {
    last_error = "invalid launch configuration";
    return cudaErrorInvalidConfiguration;
  }
  const std::function<void()> call = [&]<size_t... I>(std::index_sequence<I...>) {
    return [=] { kernel(*static_cast<P*>(arguments[I])...); };
  }(std::index_sequence_for<P...>());
  std::vector<std::unique_ptr<Block>> blocks;
  for (int64_t i = 0; i < count; ++i) {
    blocks.push_back(std::make_unique<Block>(grid.position(i), size, grid, shared_bytes, blocks, call));
    if ((i + 1) % together != 0) continue;
    if (const cudaError_t status = run_together(blocks); status != cudaSuccess) return status;
    blocks.clear();
  }
  return cudaSuccess;
}

template <typename T>
T exchange(unsigned mask, T value, unsigned source, std::source_location where) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Block& block = *Block::current;
  const int slot = block.running->shuffles++ % 2;
  std::memcpy(&block.running->offer[slot], &value, sizeof(T));
  block.wait(AT_WARP, where, mask);
  std::memcpy(&value, &block.lane(source).offer[slot], sizeof(T));
  return value;
}

inline unsigned lane_number() { return (Block::current->running - Block::current->fibers.data()) % WARP; }

}  // namespace cuda_shim

// ------------------------------------------------------------------------------------------------- the names of CUDA

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
// An array of T in dynamic shared memory, as in csrc/common/cuda.h.
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(cuda_shim::Block::current->dynamic_shared.get())

#define threadIdx (cuda_shim::Block::current->running->index)
#define blockIdx (cuda_shim::Block::current->index)
#define blockDim (cuda_shim::Block::current->size)
#define gridDim (cuda_shim::Block::current->grid)

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  cuda_shim::Block::current->wait(cuda_shim::AT_BLOCK, where);
}

inline void __syncwarp(unsigned mask = ~0u, std::source_location where = std::source_location::current()) {
  cuda_shim::Block::current->wait(cuda_shim::AT_WARP, where, mask);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, std::source_location where = std::source_location::current()) {
  return cuda_shim::exchange(mask, value, lane, where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, std::source_location where = std::source_location::current()) {
  return cuda_shim::exchange(mask, value, cuda_shim::lane_number() ^ lanes, where);
}

using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 grid, block;  // gridDim and blockDim are macros here, so it is filled in by position
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return cuda_shim::last_error.c_str(); }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_shim::PROCESSORS;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = cuda_shim::BLOCKS_PER_PROCESSOR;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  *clusters = cuda_shim::CLUSTERS;
  return cudaSuccess;
}

// CUDA_SHIM_CAPABILITY=80 stands for a device without clusters.
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  const char* capability = std::getenv("CUDA_SHIM_CAPABILITY");
  attributes->ptxVersion = capability ? std::atoi(capability) : 90;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute attribute, int value) {
  const void* key = reinterpret_cast<const void*>(kernel);
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    cuda_shim::cluster_allowed[key] = value ? 2 * cuda_shim::PORTABLE_CLUSTER : cuda_shim::PORTABLE_CLUSTER;
  } else {
    if (value > cuda_shim::MAX_SHARED_BYTES) return cudaErrorInvalidConfiguration;
    cuda_shim::shared_bytes_allowed[key] = value;
  }
  return cudaSuccess;
}

template <typename... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  return cuda_shim::launch(1, kernel, grid, block, arguments, shared_bytes);
}

template <typename... P>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments,
                                        size_t shared_bytes, cudaStream_t) {
  if (grid.volume() > cuda_shim::PROCESSORS * cuda_shim::BLOCKS_PER_PROCESSOR) {
    cuda_shim::last_error = "more blocks than the device holds at once";
    return cudaErrorInvalidConfiguration;
  }
  return cuda_shim::launch(grid.volume(), kernel, grid, block, arguments, shared_bytes);
}

template <typename... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               std::type_identity_t<P>... arguments) {
  void* pointers[] = {&arguments...};
  const int64_t cluster = config->attrs[0].val.clusterDim.volume();
  const auto allowed = cuda_shim::cluster_allowed.find(reinterpret_cast<const void*>(kernel));
  if (cluster > (allowed == cuda_shim::cluster_allowed.end() ? cuda_shim::PORTABLE_CLUSTER : allowed->second)) {
    cuda_shim::last_error = "a cluster of " + std::to_string(cluster) + " blocks";
    return cudaErrorInvalidConfiguration;
  }
  return cuda_shim::launch(cluster, kernel, config->grid, config->block, pointers, config->dynamicSmemBytes);
}
