// KoLeo in CUDA C++: the three operators that dinov2_kernels/koleo/reference.py defines.
//
// Legend: x [N, D] of type T (double, float, BFloat16, Half), contiguous; lengths, cosines and intermediate gradients
// have type A (double for double, float otherwise). This process has the B rows from `first` on, in blocks of `block`
// rows, and block g of all processes is one batch. No atomics: results are the same in every run.
//
// Unit rows come from divisions, and so do the gradients between them. The compiler cannot fuse a division into a
// multiply-add, so the last rounding stays, and the gradients of equal rows cancel exactly.
#include "common/cuda.h"

namespace dinov2_kernels::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int SIDE = 16;   // threads of a search form a square of this side
constexpr int DEPTH = 16;  // values of a row in shared memory at a time

template <typename A>
constexpr int EACH = sizeof(A) == 8 ? 2 : 4;  // rows of a thread, and as many columns
template <typename A>
constexpr int TILE = SIDE * EACH<A>;  // rows and columns of the cosines in shared memory

struct Rows {
  int64_t N, D, B, first, block;
};

template <typename A>
__device__ A at_least(A length, A eps) {
  return length < eps ? eps : length;  // NaN stays NaN
}

template <typename A>
__device__ A warp_sum(A own) {
  for (int distance = WARP / 2; distance > 0; distance /= 2) own += __shfl_xor_sync(~0u, own, distance);
  return own;
}

// The sum over the threads of a block, in every thread.
template <typename A>
__device__ A block_sum(A own) {
  __shared__ A shared[WARPS];
  own = warp_sum(own);
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = own;
  __syncthreads();
  A sum = 0;
  for (int warp = 0; warp < WARPS; ++warp) sum += shared[warp];
  __syncthreads();  // the next sum writes to shared again
  return sum;
}

// The part of ||u - v + eps||^2 of two unit rows that comes from every `step`-th value from `start` on.
template <typename T, typename A>
__device__ A squared_distance(const T* u, A u_divisor, const T* v, A v_divisor, int64_t D, A eps, int start, int step) {
  A sum = 0;
  for (int64_t d = start; d < D; d += step) {
    const A difference = A(u[d]) / u_divisor - A(v[d]) / v_divisor + eps;
    sum += difference * difference;
  }
  return sum;
}

// Each row has a warp.
template <typename T, typename A = Accumulate<T>>
__global__ void __launch_bounds__(THREADS) length_kernel(const T* x, int64_t N, int64_t D, A* length) {
  const int64_t n = blockIdx.x * int64_t(WARPS) + threadIdx.x / WARP;
  A sum = 0;
  for (int64_t d = threadIdx.x % WARP; n < N && d < D; d += WARP) sum += A(x[n * D + d]) * A(x[n * D + d]);
  sum = warp_sum(sum);
  if (n < N && threadIdx.x % WARP == 0) length[n] = std::sqrt(sum);
}

// ---- the search: a block has TILE rows of one batch, a thread the products of EACH rows with EACH columns

// Values [start, start + DEPTH) of TILE unit rows; row(i) is the number of the i-th row, or -1.
template <typename T, typename A, typename Row>
__device__ void load_unit_rows(A (&tile)[DEPTH][TILE<A> + 1], const T* x, const A* length, int64_t D, int64_t start, A eps,
                               const Row& row) {
  for (int element = threadIdx.x; element < TILE<A> * DEPTH; element += THREADS) {
    const int i = element / DEPTH, d = element % DEPTH;
    const int64_t n = row(i);
    tile[d][i] = n >= 0 && start + d < D ? A(x[n * D + start + d]) / at_least(length[n], eps) : A(0);
  }
}

// The nearest neighbours of a row so far, in the memory of the result, nearest first.
template <typename A>
struct Nearest {
  A* cosine;
  int64_t* index;
  int64_t k;

  __device__ void start(int64_t own_number) {
    for (int64_t slot = 0; slot < k; ++slot) {
      cosine[slot] = -std::numeric_limits<A>::infinity();
      index[slot] = own_number;  // until another one is found
    }
  }

  // Candidates come in the order of their numbers: if two are equally near, the later one comes second.
  __device__ void add(A candidate, int64_t number) {
    if (candidate != candidate) candidate = std::numeric_limits<A>::lowest();  // NaN: the farthest
    int64_t slot = k;
    for (; slot > 0 && candidate > cosine[slot - 1]; --slot) {
      if (slot == k) continue;
      cosine[slot] = cosine[slot - 1];
      index[slot] = index[slot - 1];
    }
    if (slot == k) return;
    cosine[slot] = candidate;
    index[slot] = number;
  }

  __device__ void finish() {
    for (int64_t slot = 0; slot < k; ++slot)
      if (cosine[slot] < -2) cosine[slot] = std::numeric_limits<A>::quiet_NaN();
  }
};

template <typename T, typename A = Accumulate<T>>
__global__ void __launch_bounds__(THREADS, 2)
    search_kernel(const T* x, const A* length, Rows rows, int64_t k, A eps, int64_t* index, A* cosine) {
  __shared__ A left[DEPTH][TILE<A> + 1], right[DEPTH][TILE<A> + 1], cosines[TILE<A>][TILE<A> + 1];
  const int64_t tiles = (rows.block + TILE<A> - 1) / TILE<A>;
  const int64_t begin = blockIdx.x / tiles * rows.block;   // start of the batch, in the rows of a process
  const int64_t top = blockIdx.x % tiles * TILE<A>;        // start of the tile, in the batch
  const int64_t own = begin + top + threadIdx.x;           // row of this process whose neighbours this thread collects
  const bool collects = threadIdx.x < TILE<A> && top + threadIdx.x < rows.block;
  const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
  Nearest<A> nearest{cosine + own * k, index + own * k, k};
  if (collects) nearest.start(rows.first + own);

  for (int64_t process = 0; process < rows.N; process += rows.B) {
    for (int64_t start = 0; start < rows.block; start += TILE<A>) {
      const int64_t column = process + begin + start;
      A sum[EACH<A>][EACH<A>] = {};
      for (int64_t d = 0; d < rows.D; d += DEPTH) {
        const auto number = [&](int64_t member, int64_t number) { return member < rows.block ? number : -1; };
        load_unit_rows(left, x, length, rows.D, d, eps, [&](int i) { return number(top + i, rows.first + begin + top + i); });
        load_unit_rows(right, x, length, rows.D, d, eps, [&](int i) { return number(start + i, column + i); });
        __syncthreads();
        for (int e = 0; e < DEPTH; ++e)
          for (int r = 0; r < EACH<A>; ++r)
            for (int c = 0; c < EACH<A>; ++c)
              sum[r][c] = std::fma(left[e][ty + r * SIDE], right[e][tx + c * SIDE], sum[r][c]);
        __syncthreads();
      }
      for (int r = 0; r < EACH<A>; ++r)
        for (int c = 0; c < EACH<A>; ++c) cosines[ty + r * SIDE][tx + c * SIDE] = sum[r][c];
      __syncthreads();
      for (int c = 0; collects && c < TILE<A> && start + c < rows.block; ++c)
        if (column + c != rows.first + own) nearest.add(cosines[threadIdx.x][c], column + c);
      // The next tile's products end with a barrier before the next write to cosines.
    }
  }
  if (collects) nearest.finish();
}

// ---- loss: a warp for each row, then a block for all

template <typename T, typename A = Accumulate<T>>
__global__ void __launch_bounds__(THREADS)
    distance_kernel(const T* x, const A* length, Rows rows, const int64_t* index, int64_t k, A eps, A* logarithm) {
  const int64_t own = blockIdx.x * int64_t(WARPS) + threadIdx.x / WARP, n = rows.first + own;
  const int lane = threadIdx.x % WARP;
  A sum = 0;
  for (int64_t slot = 0; slot < k && own < rows.B; ++slot) {
    const int64_t m = index[own * k + slot];
    const A squares = squared_distance(x + n * rows.D, at_least(length[n], eps), x + m * rows.D,
                                       at_least(length[m], eps), rows.D, eps, lane, WARP);
    sum += std::log(std::sqrt(warp_sum(squares)) + eps);
  }
  if (own < rows.B && lane == 0) logarithm[own] = sum;
}

template <typename A>
__global__ void __launch_bounds__(THREADS) loss_kernel(const A* logarithm, int64_t B, int64_t k, A* loss) {
  A sum = 0;
  for (int64_t own = threadIdx.x; own < B; own += THREADS) sum += logarithm[own];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = -sum / A(B * k);
}

// ---- gradient: a block for each row, which finds all rows that have it as neighbour

template <typename T, typename A = Accumulate<T>>
__global__ void __launch_bounds__(THREADS, 2)
    backward_kernel(const A* grad, const T* x, const A* length, Rows rows, const int64_t* index, int64_t k, A eps,
                    A* unit_gradient /* [B, D], scratch */, T* dx) {
  __shared__ unsigned leads_here[WARPS];  // a bit for each thread
  const int64_t D = rows.D, own = blockIdx.x, n = rows.first + own;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  A* g = unit_gradient + own * D;
  for (int64_t d = threadIdx.x; d < D; d += THREADS) g[d] = 0;

  // Adds the gradient of the distance from row i to its neighbour j, for i (sign 1) or for j (sign -1).
  const auto add_pull = [&](int64_t i, int64_t j, A sign) {
    if (i == j) return;  // a single row
    const T *u = x + i * D, *v = x + j * D;
    const A u_divisor = at_least(length[i], eps), v_divisor = at_least(length[j], eps);
    const A distance =
        std::sqrt(block_sum(squared_distance(u, u_divisor, v, v_divisor, D, eps, int(threadIdx.x), THREADS)));
    if (distance == 0) return;
    const A divisor = distance * (distance + eps) / (-sign * grad[i / rows.B] / A(rows.B * k));
    for (int64_t d = threadIdx.x; d < D; d += THREADS) g[d] += (A(u[d]) / u_divisor - A(v[d]) / v_divisor + eps) / divisor;
  };
  for (int64_t slot = 0; slot < k; ++slot) add_pull(n, index[n * k + slot], A(1));
  for (int64_t start = 0; start < rows.N * k; start += THREADS) {
    const int64_t entry = start + threadIdx.x;
    unsigned bits = entry < rows.N * k && index[entry] == n ? 1u << lane : 0u;
    for (int distance = WARP / 2; distance > 0; distance /= 2) bits |= __shfl_xor_sync(~0u, bits, distance);
    if (lane == 0) leads_here[warp] = bits;
    __syncthreads();
    for (int other = 0; other < THREADS; ++other)
      if (leads_here[other / WARP] >> other % WARP & 1) add_pull((start + other) / k, n, A(-1));
    __syncthreads();  // the next entries write to leads_here again
  }

  const A divisor = at_least(length[n], eps);
  A product = 0;
  for (int64_t d = threadIdx.x; d < D; d += THREADS) product += A(x[n * D + d]) / divisor * g[d];
  const A along = block_sum(product);  // the part of g that would only change the length
  for (int64_t d = threadIdx.x; d < D; d += THREADS) {
    const A gradient = (g[d] - A(x[n * D + d]) / divisor * along) / divisor;
    dx[own * D + d] = T(length[n] < eps ? A(0) : gradient);  // such a short row has no direction
  }
}

// ------------------------------------------------------------------------------------------------------- the operators

Tensor new_empty(const Tensor& x, std::initializer_list<int64_t> sizes) {
  const bool is_double = x.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(x, sizes, is_double ? ScalarType::Double : ScalarType::Float);
}

Rows rows_of(const Tensor& x, int64_t n_groups, int64_t world_size, int64_t rank) {
  const int64_t N = x.size(0), B = N / world_size;
  return {N, x.size(1), B, rank * B, B / n_groups};
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

int64_t warps_to_blocks(int64_t warps) { return (warps + WARPS - 1) / WARPS; }

// Lengths [N] of all rows. Bytes: one read of x.
template <typename T, typename A = Accumulate<T>>
Tensor lengths(const Tensor& x) {
  Tensor length = new_empty(x, {x.size(0)});
  launch(x, warps_to_blocks(x.size(0)), THREADS, length_kernel<T>, data<T>(x), x.size(0), x.size(1),
         static_cast<A*>(length.data_ptr()));
  return length;
}

// Index and cosine [B, k]. Bytes: a block reads its batch, mostly from L2, once for each TILE rows of this process.
template <typename T, typename A = Accumulate<T>>
std::tuple<Tensor, Tensor> search(const Tensor& x, const Tensor& length, const Rows& rows, int64_t k, double eps) {
  Tensor index = torch::stable::new_empty(x, {rows.B, k}, ScalarType::Long), cosine = new_empty(x, {rows.B, k});
  launch(x, (rows.block + TILE<A> - 1) / TILE<A> * (rows.B / rows.block), THREADS, search_kernel<T>, data<T>(x),
         data<A>(length), rows, k, A(eps), static_cast<int64_t*>(index.data_ptr()),
         static_cast<A*>(cosine.data_ptr()));
  return {index, cosine};
}

std::tuple<Tensor, Tensor> koleo_nearest(const Tensor& x, int64_t k, int64_t n_groups, int64_t world_size,
                                         int64_t rank, double eps) {
  const Rows rows = rows_of(x, n_groups, world_size, rank);
  return dispatch_floating(x.scalar_type(), [&]<typename T>() { return search<T>(x, lengths<T>(x), rows, k, eps); });
}

// Bytes: those of the search, 2 k B rows, and a few vectors [N].
std::tuple<Tensor, Tensor> koleo_forward(const Tensor& x, int64_t k, int64_t n_groups, int64_t world_size,
                                         int64_t rank, double eps) {
  const Rows rows = rows_of(x, n_groups, world_size, rank);
  Tensor loss = new_empty(x, {}), logarithm = new_empty(x, {rows.B});
  return dispatch_floating(x.scalar_type(), [&]<typename T>() -> std::tuple<Tensor, Tensor> {
    using A = Accumulate<T>;
    const Tensor length = lengths<T>(x);
    const Tensor index = std::get<0>(search<T>(x, length, rows, k, eps));
    A* logarithms = static_cast<A*>(logarithm.data_ptr());
    launch(x, warps_to_blocks(rows.B), THREADS, distance_kernel<T>, data<T>(x), data<A>(length), rows,
           data<int64_t>(index), k, A(eps), logarithms);
    launch(x, 1, THREADS, loss_kernel<A>, logarithms, rows.B, k, static_cast<A*>(loss.data_ptr()));
    return {loss, index};
  });
}

// Bytes: B reads of index [N, k] from L2, 4 k B rows of x, mostly from L2, and a few passes over [B, D].
Tensor koleo_backward(const Tensor& grad, const Tensor& x, const Tensor& index, int64_t rank, double eps) {
  const Rows rows = rows_of(x, 1, grad.numel(), rank);
  Tensor dx = torch::stable::new_empty(x, {rows.B, rows.D}), unit_gradient = new_empty(x, {rows.B, rows.D});
  dispatch_floating(x.scalar_type(), [&]<typename T>() {
    using A = Accumulate<T>;
    const Tensor length = lengths<T>(x);
    launch(x, rows.B, THREADS, backward_kernel<T>, data<A>(grad), data<T>(x), data<A>(length), rows, data<int64_t>(index),
           index.size(1), A(eps), static_cast<A*>(unit_gradient.data_ptr()), static_cast<T*>(dx.data_ptr()));
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(DINOV2_CUDA_NAMESPACE, DINOV2_CUDA_KEY, m) {
  m.impl("koleo_nearest", TORCH_BOX(&koleo_nearest));
  m.impl("koleo_forward", TORCH_BOX(&koleo_forward));
  m.impl("koleo_backward", TORCH_BOX(&koleo_backward));
}

}  // namespace dinov2_kernels::cuda
