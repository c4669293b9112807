// KoLeo on CPU: operators, and how threads share their work. cpu_kernels.cpp has the work of one thread; the definition,
// with the meaning of all arguments, is dinov2_kernels/koleo/reference.py.
//
// The search goes through pairs of panels of unit rows, which are packed first: [N, D] of scratch memory, in float32 for
// rows narrower than float64. Each tile of cosines is used in the cache, for its rows and, because the cosine is
// symmetric, for its columns. The result for a row does not depend on the thread, so results are the same for every
// number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/huge_pages.h"
#include "koleo/cpu_kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

namespace {

constexpr int64_t kGrain = 1 << 17;        // values below which a second thread does not pay
constexpr int64_t kSearchGrain = 1 << 20;  // multiplications below which a second thread does not pay in a search
constexpr int64_t kInsertion = 16;         // inserting a neighbour takes the time of this many values

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The rows of this process among all N, and the batches that they form.
struct Rows {
  int64_t N, D, B, first, block;

  Rows(const Tensor& x, int64_t n_groups, int64_t world_size, int64_t rank)
      : N(x.size(0)), D(x.size(1)), B(N / world_size), first(rank * B), block(B / n_groups) {}

  int32_t batch(int64_t n) const { return static_cast<int32_t>(n % B / block); }
};

// Calls body(i) for each of n rows of D values.
template <class Body>
void parallel_rows(int64_t n, int64_t D, const Body& body) {
  parallel_for(0, n, std::max<int64_t>(kGrain / std::max<int64_t>(D, 1), 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

ScalarType accumulation_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls body.operator()<X>() with the C++ type of the rows.
template <class Body>
void dispatch(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return body.template operator()<double>();
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::BFloat16: return body.template operator()<bf16>();
    case ScalarType::Half: return body.template operator()<fp16>();
    default: STD_TORCH_CHECK(false, "x: expected float64, float32, bfloat16 or float16");
  }
}

template <class X, class A = accumulate_t<X>>
std::vector<A> lengths(const X* x, int64_t N, int64_t D) {
  const auto kernel = ON_CPU_TARGET(length<X>);
  std::vector<A> lengths(N);
  parallel_rows(N, D, [&](int64_t n) { lengths[n] = kernel(x + n * D, D); });
  return lengths;
}

// The divisors of rows of these lengths.
template <class A>
std::vector<A> at_least(std::vector<A> lengths, double eps) {
  for (A& length : lengths) length = std::max(length, static_cast<A>(eps));  // NaN stays NaN
  return lengths;
}

// The neighbours of some rows; the first row has number `base`. At first, each row is its own neighbour.
template <class A>
class Neighbors {
 public:
  const int64_t rows, k, base;

  Neighbors(int64_t rows, int64_t k, int64_t base)
      : rows(rows), k(k), base(base), cosine_(rows * k, -std::numeric_limits<A>::infinity()), index_(rows * k) {
    for (int64_t i = 0; i < rows * k; ++i) index_[i] = base + i % rows;
  }

  Nearest<A> nearest() { return {cosine_.data(), index_.data(), rows, k}; }
  A cosine(int64_t n, int64_t slot) const { return cosine_[slot * rows + n - base]; }
  int64_t index(int64_t n, int64_t slot) const { return index_[slot * rows + n - base]; }

 private:
  std::vector<A> cosine_;
  std::vector<int64_t> index_;
};

template <class X, class A>
std::vector<Panel<A>> pack(const X* x, const std::vector<A>& divisor, const Rows& rows, A* unit) {
  const int64_t P = ON_CPU_TARGET(panel_rows)(), D = rows.D;
  const auto kernel = ON_CPU_TARGET(pack_panel<X>);
  std::vector<Panel<A>> panels(ceil_div(rows.N, P));
  parallel_rows(panels.size(), P * D, [&](int64_t p) {
    const int64_t first = p * P, n = std::min(P, rows.N - first);
    kernel(x + first * D, divisor.data() + first, n, D, unit + first * D);
    Panel<A>& panel = panels[p] = {unit + first * D, first, n, n < P ? -1 : rows.batch(first), 0};
    for (int64_t i = 0; i < n; ++i) {
      panel.low = std::min(panel.low, rows.batch(first + i));
      panel.high = std::max(panel.high, rows.batch(first + i));
    }
  });
  return panels;
}

// The k nearest neighbours of each row of this process; row i is at rows.first - base + i.
template <class X, class A>
Neighbors<A> find_nearest(const Tensor& x, const std::vector<A>& divisor, const Rows& rows, int64_t k) {
  const int64_t P = ON_CPU_TARGET(panel_rows)();
  const auto search = ON_CPU_TARGET(search<A>);
  const auto insert = ON_CPU_TARGET(insert<A>);

  const int64_t padded = ceil_div(rows.N, P) * P;
  Tensor unit = torch::stable::new_empty(x, {padded, rows.D}, accumulation_dtype(x));
  advise_huge_pages(unit.mutable_data_ptr(), unit.numel() * sizeof(A));
  const auto panels = pack(static_cast<const X*>(x.const_data_ptr()), divisor, rows, unit.mutable_data_ptr<A>());
  std::vector<int32_t> batch(padded, -1);
  for (int64_t n = 0; n < rows.N; ++n) batch[n] = rows.batch(n);

  // A panel is ours if it holds any row of this process; neighbours of its other rows are found, but not used.
  const int64_t begin = rows.first / P, end = ceil_div(rows.first + rows.B, P), base = begin * P;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), end - begin);
  const int64_t parts = std::clamp<int64_t>(rows.B * rows.N * rows.D / kSearchGrain, 1, threads);
  Neighbors<A> found((end - begin) * P, k, base);
  std::vector<Neighbors<A>> of_columns(parts, found);  // one for each part, because parts have the same columns
  std::atomic<int64_t> next = begin;
  parallel_for(0, parts, 1, [&](int64_t part, int64_t) {
    const Nearest<A> of_left = found.nearest(), of_right = of_columns[part].nearest();
    for (int64_t p; (p = next++) < end;) {
      for (int64_t q = 0; q < static_cast<int64_t>(panels.size()); ++q) {
        const bool ours = begin <= q && q < end;
        if ((ours && q < p) || panels[q].high < panels[p].low || panels[p].high < panels[q].low) continue;
        search(panels[p], panels[q], rows.D, batch.data(), base, of_left, ours ? &of_right : nullptr);
      }
    }
  });
  parallel_rows(rows.B, parts * k * kInsertion, [&](int64_t i) {
    for (const Neighbors<A>& other : of_columns) {
      for (int64_t n = rows.first + i, slot = 0; slot < k && other.index(n, slot) != n; ++slot) {
        insert(found.nearest(), n - base, other.cosine(n, slot), other.index(n, slot));
      }
    }
  });
  return found;
}

std::tuple<Tensor, Tensor> koleo_nearest(const Tensor& x, int64_t k, int64_t n_groups, int64_t world_size,
                                         int64_t rank, double eps) {
  const Rows rows(x, n_groups, world_size, rank);
  Tensor index = torch::stable::new_empty(x, {rows.B, k}, ScalarType::Long);
  Tensor cosine = torch::stable::new_empty(x, {rows.B, k}, accumulation_dtype(x));
  dispatch(x, [&]<class X>() {
    using A = accumulate_t<X>;
    const X* data = static_cast<const X*>(x.const_data_ptr());
    const auto found = find_nearest<X>(x, at_least(lengths(data, rows.N, rows.D), eps), rows, k);
    for (int64_t i = 0; i < rows.B * k; ++i) {
      const A value = found.cosine(rows.first + i / k, i % k);
      index.mutable_data_ptr<int64_t>()[i] = found.index(rows.first + i / k, i % k);
      cosine.mutable_data_ptr<A>()[i] = value < -2 ? std::numeric_limits<A>::quiet_NaN() : value;
    }
  });
  return {index, cosine};
}

std::tuple<Tensor, Tensor> koleo_forward(const Tensor& x, int64_t k, int64_t n_groups, int64_t world_size,
                                         int64_t rank, double eps) {
  const Rows rows(x, n_groups, world_size, rank);
  Tensor loss = torch::stable::new_empty(x, {}, accumulation_dtype(x));
  Tensor index = torch::stable::new_empty(x, {rows.B, k}, ScalarType::Long);
  dispatch(x, [&]<class X>() {
    using A = accumulate_t<X>;
    const X* data = static_cast<const X*>(x.const_data_ptr());
    int64_t* indices = index.mutable_data_ptr<int64_t>();
    const auto divisor = at_least(lengths(data, rows.N, rows.D), eps);
    const auto found = find_nearest<X>(x, divisor, rows, k);
    const auto distance = ON_CPU_TARGET(distance<X>);
    std::vector<double> logarithms(rows.B);  // summed over a row's neighbours
    parallel_rows(rows.B, k * rows.D, [&](int64_t i) {
      const int64_t n = rows.first + i;
      for (int64_t slot = 0; slot < k; ++slot) {
        const int64_t m = indices[i * k + slot] = found.index(n, slot);
        const A apart = distance(data + n * rows.D, divisor[n], data + m * rows.D, divisor[m], rows.D, eps);
        logarithms[i] += std::log(apart + eps);
      }
    });
    *loss.mutable_data_ptr<A>() = -std::accumulate(logarithms.begin(), logarithms.end(), 0.0) / (rows.B * k);
  });
  return {loss, index};
}

// The rows that have row i of this process as neighbour: who[start[i]] to who[start[i + 1] - 1], in ascending order.
struct Followers {
  std::vector<int64_t> start, who;

  Followers(const int64_t* index, int64_t k, const Rows& rows) : start(rows.B + 1) {
    const auto row = [&](int64_t e) { return index[e] - rows.first; };
    const auto ours = [&](int64_t e) { return 0 <= row(e) && row(e) < rows.B; };
    for (int64_t e = 0; e < rows.N * k; ++e) start[ours(e) ? row(e) + 1 : 0] += ours(e);
    std::partial_sum(start.begin(), start.end(), start.begin());
    who.resize(start.back());
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t e = 0; e < rows.N * k; ++e)
      if (ours(e)) who[next[row(e)]++] = e / k;
  }
};

Tensor koleo_backward(const Tensor& grad, const Tensor& x, const Tensor& index, int64_t rank, double eps) {
  const Rows rows(x, 1, grad.numel(), rank);
  const int64_t k = index.size(1), B = rows.B, D = rows.D;
  Tensor dx = torch::stable::new_empty(x, {B, D});
  dispatch(x, [&]<class X>() {
    using A = accumulate_t<X>;
    const X* data = static_cast<const X*>(x.const_data_ptr());
    X* out = static_cast<X*>(dx.mutable_data_ptr());
    advise_huge_pages(out, B * D * sizeof(X));
    const A* grads = grad.const_data_ptr<A>();
    const int64_t* neighbors = index.const_data_ptr<int64_t>();
    const auto length = lengths(data, rows.N, D);
    const auto divisor = at_least(length, eps);
    const Followers followers(neighbors, k, rows);
    const auto distance = ON_CPU_TARGET(distance<X>);
    const auto add_difference = ON_CPU_TARGET(add_difference<X>);
    const auto normalize_backward = ON_CPU_TARGET(normalize_backward<X>);

    // Adds to g the gradient of the distance from row n to its neighbour m, for n (sign 1) or for m (sign -1).
    const auto add_pull = [&](int64_t n, int64_t m, int sign, A* g) {
      const X *from = data + n * D, *to = data + m * D;
      const A apart = distance(from, divisor[n], to, divisor[m], D, eps);
      if (n == m || apart == 0) return;
      const A slope = -grads[n / B] / (B * k) / (apart * (apart + static_cast<A>(eps)));
      add_difference(from, divisor[n], to, divisor[m], D, eps, sign * slope, g);
    };
    parallel_for(0, B, std::max<int64_t>(kGrain / std::max<int64_t>(4 * k * D, 1), 1), [&](int64_t begin, int64_t end) {
      std::vector<A> g(D);  // gradient of a unit row
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = rows.first + i;
        std::fill(g.begin(), g.end(), A(0));
        for (int64_t slot = 0; slot < k; ++slot) add_pull(n, neighbors[n * k + slot], 1, g.data());
        for (int64_t f = followers.start[i]; f < followers.start[i + 1]; ++f) add_pull(followers.who[f], n, -1, g.data());
        if (length[n] < static_cast<A>(eps)) std::fill(g.begin(), g.end(), A(0));  // it has no direction
        normalize_backward(data + n * D, divisor[n], g.data(), D, out + i * D);
      }
    });
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dinov2_kernels, CPU, m) {
  m.impl("koleo_nearest", TORCH_BOX(&koleo_nearest));
  m.impl("koleo_forward", TORCH_BOX(&koleo_forward));
  m.impl("koleo_backward", TORCH_BOX(&koleo_backward));
}
