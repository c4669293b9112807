#include "koleo/cpu_kernels.h"

#include <math.h>

#include "common/pack.h"

namespace CPU_TARGET {

// Replaces a NaN cosine: farther than all others, but still a candidate.
template <class A>
constexpr A kFarthest = sizeof(A) == 4 ? A(-0x1.fffffep127) : A(-0x1.fffffffffffffp1023);

int64_t panel_rows() { return kPanel; }

template <class A>
ALWAYS_INLINE A add_lanes(vec<A> v) {
  return combine_lanes(v, [](auto a, auto b) { return a + b; });
}

// A vector of a row divided by the row's divisor, whose inverse is given: rounded as a division, at a third of the cost.
template <class A>
ALWAYS_INLINE vec<A> divide(vec<A> x, A divisor, A inverse) {
#if defined(__FMA__)
  const vec<A> quotient = x * inverse;
  return rounded(quotient + (x - quotient * divisor) * inverse);  // a multiply-add computes the remainder exactly
#else
  return x / divisor;
#endif
}

template <class X, class A>
A length(const X* x, int64_t D) {
  vec<A> sum = {};
  for_each_vector<A>(0, D, [&](int64_t d, auto part) {
    const vec<A> value = load(x + d, part);
    sum += value * value;
  });
  return __builtin_sqrt(add_lanes<A>(sum));
}

template <class X, class A>
void pack_panel(const X* x, const A* divisor, int64_t n, int64_t D, A* panel) {
  constexpr int L = lanes<A>;
  A inverse[kPanel];
  for (int64_t i = 0; i < n; ++i) inverse[i] = 1 / divisor[i];
  for (int64_t first = 0; first < kPanel; first += L) {
    for_each_vector<A>(0, D, [&](int64_t d, auto part) {
      vec<A> square[L];
      for (int64_t i = 0; i < L; ++i) {
        const int64_t row = first + i;
        square[i] = row < n ? divide(load(x + row * D + d, part), divisor[row], inverse[row]) : vec<A>{};
      }
      transpose_square<A>(square);
      for (int64_t i = 0; i < L && d + i < D; ++i) store(panel + (d + i) * kPanel + first, square[i]);
    });
  }
}

// ---- the search

// Rows [first, first + rows) of the left panel times columns [begin, end) of the right one: a part of [kPanel, kPanel].
static void multiply(const float* left, const float* right, int64_t D, int64_t first, int64_t rows, int64_t begin,
                     int64_t end, float* tile) {
  const Left<float> transpose{left + first, 1, kPanel};
  multiply(transpose, Right<float>{right + begin, kPanel, 0}, D, rows, end - begin, tile + first * kPanel + begin, kPanel,
           false);
}

static void multiply(const double* left, const double* right, int64_t D, int64_t first, int64_t rows, int64_t begin,
                     int64_t end, double* tile) {
  for (int64_t i = first; i < first + rows; ++i) {
    for (int64_t j = begin; j < end; j += lanes<double>) {
      vec<double> sum = {};
      for (int64_t d = 0; d < D; ++d) sum += broadcast(left[d * kPanel + i]) * load(right + d * kPanel + j);
      store(tile + i * kPanel + j, sum);
    }
  }
}

// All cosines of two panels [kPanel, kPanel]; for a panel with itself, at least those above the diagonal.
template <class A>
static void multiply_panels(const Panel<A>& left, const Panel<A>& right, bool same, int64_t D, A* tile) {
  const int64_t strip = same ? lanes<A> : kPanel;
  for (int64_t first = 0; first < left.rows; first += strip) {
    const int64_t rows = left.rows - first < strip ? left.rows - first : strip;
    multiply(left.unit, right.unit, D, first, rows, same ? first : 0, right.rows, tile);
  }
}

// Writes -inf for pairs of different batches and, for a panel with itself, for pairs that come twice.
template <class A>
static void exclude(const Panel<A>& left, const Panel<A>& right, bool same, const int32_t* batch, A* tile) {
  for (int64_t i = 0; i < left.rows; ++i) {
    const int64_t met = same ? i + 1 : 0;
    for (int64_t j = 0; j < kPanel; ++j) {
      const bool meet = j >= met && batch[right.first + j] == batch[left.first + i];
      tile[i * kPanel + j] = meet ? tile[i * kPanel + j] : A(-INFINITY);
    }
  }
}

template <class A>
void insert(const Nearest<A>& nearest, int64_t i, A cosine, int64_t index) {
  A* cosines = nearest.cosine + i;
  int64_t* indices = nearest.index + i;
  int64_t slot = nearest.k;
  for (; slot > 0; --slot) {
    const int64_t nearer = (slot - 1) * nearest.rows;
    if (cosine < cosines[nearer] || (cosine == cosines[nearer] && index > indices[nearer])) break;
    if (slot == nearest.k) continue;  // the farthest one is dropped
    cosines[slot * nearest.rows] = cosines[nearer];
    indices[slot * nearest.rows] = indices[nearer];
  }
  if (slot == nearest.k) return;
  cosines[slot * nearest.rows] = cosine;
  indices[slot * nearest.rows] = index;
}

// Cosines without NaN.
template <class A>
ALWAYS_INLINE vec<A> comparable(const A* cosines) {
  const vec<A> v = load(cosines);
  return v == v ? v : broadcast(kFarthest<A>);
}

template <class A>
void search(const Panel<A>& left, const Panel<A>& right, int64_t D, const int32_t* batch, int64_t base,
            const Nearest<A>& of_left, const Nearest<A>* of_right) {
  constexpr int L = lanes<A>;
  alignas(64) A tile[kPanel * kPanel];
  const bool same = left.first == right.first;
  multiply_panels(left, right, same, D, tile);
  if (same || left.low != left.high || right.low != right.high) exclude(left, right, same, batch, tile);

  // Candidates come in the order of their numbers, so a candidate as near as a row's last neighbour does not replace it.
  const A* left_last = of_left.cosine + (of_left.k - 1) * of_left.rows + left.first - base;
  for (int64_t i = 0; i < left.rows; ++i) {
    for (int64_t j = 0; j < kPanel; j += L) {
      const vec<A> cosine = comparable(tile + i * kPanel + j);
      if (!any_greater(cosine, broadcast(left_last[i]))) continue;
      for (int lane = 0; lane < L; ++lane) {
        if (cosine[lane] > left_last[i]) insert(of_left, left.first - base + i, A(cosine[lane]), right.first + j + lane);
      }
    }
  }
  if (of_right == nullptr) return;
  const A* right_last = of_right->cosine + (of_right->k - 1) * of_right->rows + right.first - base;
  for (int64_t j = 0; j < kPanel; j += L) {
    for (int64_t i = 0; i < left.rows; ++i) {
      const vec<A> cosine = comparable(tile + i * kPanel + j);
      if (!any_greater(cosine, load(right_last + j))) continue;
      for (int lane = 0; lane < L; ++lane) {
        if (cosine[lane] > right_last[j + lane])
          insert(*of_right, right.first - base + j + lane, A(cosine[lane]), left.first + i);
      }
    }
  }
}

// ---- distances and their gradients

// Calls body(d, a - b + eps, part) for the vectors of two unit rows. Equal rows cancel exactly.
template <class X, class A, class Body>
ALWAYS_INLINE void for_difference(const X* a, A a_divisor, const X* b, A b_divisor, int64_t D, A eps, Body body) {
  const A a_inverse = 1 / a_divisor, b_inverse = 1 / b_divisor;
  for_each_vector<A>(0, D, [&](int64_t d, auto part) {
    const vec<A> u = divide(load(a + d, part), a_divisor, a_inverse);
    body(d, u - divide(load(b + d, part), b_divisor, b_inverse) + eps, part);
  });
}

template <class X, class A>
A distance(const X* a, A a_divisor, const X* b, A b_divisor, int64_t D, A eps) {
  vec<A> sum = {};
  for_difference(a, a_divisor, b, b_divisor, D, eps, [&](int64_t, vec<A> v, auto part) {
    const vec<A> inside = zero_outside(v, part);
    sum += inside * inside;
  });
  return __builtin_sqrt(add_lanes<A>(sum));
}

template <class X, class A>
void add_difference(const X* a, A a_divisor, const X* b, A b_divisor, int64_t D, A eps, A scale, A* g) {
  for_difference(a, a_divisor, b, b_divisor, D, eps, [&](int64_t d, vec<A> v, auto part) {
    // Rounded before it is added: two equal rows that are each other's neighbours have large gradients that cancel.
    store(g + d, load(g + d, part, A(0)) + rounded(v * scale), part);
  });
}

template <class X, class A>
void normalize_backward(const X* x, A divisor, const A* g, int64_t D, X* dx) {
  const A inverse = 1 / divisor;
  vec<A> sum = {};
  for_each_vector<A>(0, D, [&](int64_t d, auto part) {
    sum += divide(load(x + d, part), divisor, inverse) * load(g + d, part, A(0));
  });
  const A along = add_lanes<A>(sum);  // the part of g that would only change the length
  for_each_vector<A>(0, D, [&](int64_t d, auto part) {
    const vec<A> unit = divide(load(x + d, part), divisor, inverse);
    store(dx + d, (load(g + d, part, A(0)) - unit * along) * inverse, part);
  });
}

#define INSTANTIATE_SEARCH(A)                                                                                          \
  template void search(const Panel<A>&, const Panel<A>&, int64_t, const int32_t*, int64_t, const Nearest<A>&,           \
                       const Nearest<A>*);                                                                             \
  template void insert(const Nearest<A>&, int64_t, A, int64_t);
INSTANTIATE_SEARCH(float)
INSTANTIATE_SEARCH(double)

#define INSTANTIATE(X, A)                                                          \
  template A length(const X*, int64_t);                                            \
  template void pack_panel(const X*, const A*, int64_t, int64_t, A*);              \
  template A distance(const X*, A, const X*, A, int64_t, A);                       \
  template void add_difference(const X*, A, const X*, A, int64_t, A, A, A*);       \
  template void normalize_backward(const X*, A, const A*, int64_t, X*);
INSTANTIATE(double, double)
INSTANTIATE(float, float)
INSTANTIATE(bf16, float)
INSTANTIATE(fp16, float)

}  // namespace CPU_TARGET
