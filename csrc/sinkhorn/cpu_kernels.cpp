#include "sinkhorn/cpu_kernels.h"

#include <math.h>

#include "common/exp.h"

namespace CPU_TARGET {

// Number of values in one step: rows of a column, or vectors of a row. They share one rescaling of the sum so far.
constexpr int kStep = 8;
// Largest number of columns in a pass down the rows; their sums stay in the first-level cache.
constexpr int kTile = kMaxTileWidth;

// A shift below every later finite number; with it, -inf gives exp(-inf) = 0.
template <class A>
constexpr A kNoShift = sizeof(A) == 4 ? A(-0x1.fffffep127) : A(-0x1.fffffffffffffp1023);

// An online log-sum-exp of scale * x, lane by lane: adds N values x to the sum of exp(scale * (x - shift)). The shift is
// an earlier value; it rises to the maximum only if an exponential would otherwise exceed e^kSlack.
template <class A, int N>
ALWAYS_INLINE void add_values(const vec<A> (&x)[N], A scale, vec<A>& shift, wide<A>& sum) {
  constexpr A kSlack = 32;
  vec<A> max = shift;
  for (int i = 0; i < N; ++i) max = maximum(x[i], max);
  if (any_greater((max - shift) * scale, broadcast(kSlack))) {
    sum *= widen<A>(exp<A>((shift - max) * scale));
    shift = max;
  }
  vec<A> added = exp<A>((x[0] - shift) * scale);
  for (int i = 1; i < N; ++i) added += exp<A>((x[i] - shift) * scale);
  sum += widen<A>(added);
}

template <int N, class X, class A>
ALWAYS_INLINE void add_rows(const X* x, int64_t K, A inverse_T, int64_t columns, A* shift, double* sum) {
  for_each_vector<A>(0, columns, [&](int64_t k, auto part) {
    vec<A> rows[N], shift_k = load(shift + k);
    wide<A> sum_k = load_wide<A>(sum + k);
    for (int b = 0; b < N; ++b) rows[b] = load(x + b * K + k, part);
    add_values<A, N>(rows, inverse_T, shift_k, sum_k);
    store(shift + k, shift_k);
    store(sum + k, sum_k);
  });
}

static float log_of(float x) { return logf(x); }
static double log_of(double x) { return log(x); }

template <class X, class A>
void column_logsumexp(const X* x, int64_t B, int64_t K, double T, int64_t begin, int64_t end, A* out) {
  const A inverse_T = 1 / T;
  for (; begin < end; begin += kTile) {
    const int64_t columns = end - begin < kTile ? end - begin : kTile;
    A shift[kTile];
    double sum[kTile] = {};
    for (A& s : shift) s = kNoShift<A>;
    int64_t b = 0;
    for (; b + kStep <= B; b += kStep) add_rows<kStep>(x + b * K + begin, K, inverse_T, columns, shift, sum);
    for (; b < B; ++b) add_rows<1>(x + b * K + begin, K, inverse_T, columns, shift, sum);
    for (int64_t k = 0; k < columns; ++k) out[begin + k] = shift[k] / T + log_of(static_cast<A>(sum[k]));
  }
}

// z = x / T + bias, and -inf past the end of a row. Every pass over a row must round z in the same way, or z - shift
// would not be exact for constant z. The loads come first, so that all passes fuse the multiplication and the addition.
template <class X, class A, class WholeOrPart>
ALWAYS_INLINE vec<A> biased(const X* x, A inverse_T, const A* bias, WholeOrPart part) {
  const vec<A> x_k = load(x, part), bias_k = load(bias, part, A(-INFINITY));
  return x_k * inverse_T + bias_k;
}

template <class X, class A>
RowScale<A> row_scale(const X* x, int64_t K, double T, const A* bias) {
  const A inverse_T = 1 / T;
  vec<A> shift = broadcast(kNoShift<A>);
  wide<A> sum = {};
  int64_t k = 0;
  for (; k + kStep * lanes<A> <= K; k += kStep * lanes<A>) {
    vec<A> z[kStep];
    for (int i = 0; i < kStep; ++i) z[i] = biased(x + k + i * lanes<A>, inverse_T, bias + k + i * lanes<A>, Whole{});
    add_values<A, kStep>(z, 1, shift, sum);
  }
  for_each_vector<A>(k, K, [&](int64_t k, auto part) {
    const vec<A> z[1] = {biased(x + k, inverse_T, bias + k, part)};
    add_values<A, 1>(z, 1, shift, sum);
  });
  const A row_shift = largest_lane<A>(shift);
  sum *= widen<A>(exp<A>(shift - row_shift));
  return {row_shift, static_cast<A>(1 / sum_of_lanes<A>(sum))};
}

// Adds the share of N rows to the mass of some columns, and passes every vector of z and p to visit(b, k, z, p). The rows
// are K apart, and hardware does not prefetch over such distances, so this code prefetches the next N rows.
template <int N, class X, class A, class Visit>
ALWAYS_INLINE void add_mass(const X* x, int64_t K, A inverse_T, const A* bias, const RowScale<A>* rows,
                            int64_t columns, double* mass, Visit visit) {
  for_each_vector<A>(0, columns, [&](int64_t k, auto part) {
    vec<A> added = {};
    for (int b = 0; b < N; ++b) {
      const vec<A> z = biased(x + b * K + k, inverse_T, bias + k, part);
      const vec<A> p = exp<A>(z - rows[b].shift) * rows[b].inverse_sum;
      added += p;
      visit(b, k, z, p);
    }
    store(mass + k, load_wide<A>(mass + k) + widen<A>(added));
    for (int b = 0; b < N; ++b) __builtin_prefetch(x + (N + b) * K + k);
  });
}

// mass[k] = sum_b p_bk, for at most kTile columns. Past their end, a vector has p = 0.
template <class X, class A, class Visit>
ALWAYS_INLINE void tile_mass(const X* x, int64_t B, int64_t K, A inverse_T, const A* bias, const RowScale<A>* rows,
                             int64_t columns, double* mass, Visit visit) {
  for (int64_t k = 0; k < kTile; ++k) mass[k] = 0;
  int64_t begin = 0;
  const auto visit_row = [&](int64_t b, int64_t k, vec<A> z, vec<A> p) { visit(begin + b, k, z, p); };
  for (; begin + kStep <= B; begin += kStep) {
    add_mass<kStep>(x + begin * K, K, inverse_T, bias, rows + begin, columns, mass, visit_row);
  }
  for (; begin < B; ++begin) add_mass<1>(x + begin * K, K, inverse_T, bias, rows + begin, columns, mass, visit_row);
}

template <class X, class A>
void column_mass(const X* x, int64_t B, int64_t K, double T, const A* bias, const RowScale<A>* rows, int64_t begin,
                 int64_t end, A* out) {
  for (; begin < end; begin += kTile) {
    const int64_t columns = end - begin < kTile ? end - begin : kTile;
    double mass[kTile];
    tile_mass<X, A>(x + begin, B, K, 1 / T, bias + begin, rows, columns, mass, [](auto...) {});
    for (int64_t k = 0; k < columns; ++k) out[begin + k] = static_cast<A>(mass[k]);
  }
}

// A bias that makes the largest z of the first rows 0. The largest z of all rows is then usually within reach.
template <class X, class A>
ALWAYS_INLINE void guess_bias(const X* x, int64_t B, int64_t K, A inverse_T, int64_t columns, A* bias) {
  for_each_vector<A>(0, columns, [&](int64_t k, auto part) {
    vec<A> max = broadcast(kNoShift<A>);
    for (int64_t b = 0; b < B && b < kStep; ++b) max = maximum(load(x + b * K + k, part), max);
    store(bias + k, max > kNoShift<A> ? -max * inverse_T : vec<A>{}, part);
  });
}

// Whether the largest z of a column is so far from 0 that exp(z) might overflow, or underflow and change the sum. Within
// reach, the column's sum and its inverse are normal numbers.
template <class A>
static bool out_of_reach(A largest) {
  constexpr A kReach = 60;
  return largest > kReach || (largest < -kReach && largest > -INFINITY);
}

// Makes the largest z 0 in columns where it is out of reach; returns whether there were any.
template <class A>
static bool correct_bias(const A* largest, int64_t columns, A* bias) {
  bool corrected = false;
  for (int64_t k = 0; k < columns; ++k) {
    if (out_of_reach(largest[k])) {
      bias[k] -= largest[k];
      corrected = true;
    }
  }
  return corrected;
}

// bias -= log mass. weight = exp(new bias - old bias), with the rounded biases, turns p into its value with the new bias.
// A column without mass keeps its bias.
template <class A>
static void balance(const double* mass, int64_t columns, A* bias, A* weight) {
  for (int64_t k = 0; k < columns; ++k) {
    const A old = bias[k];
    if (mass[k] != 0) bias[k] -= log_of(static_cast<A>(mass[k]));
    weight[k] = bias[k] - old;
  }
  for (int64_t k = columns; k % lanes<A> != 0; ++k) weight[k] = 0;
  for (int64_t k = 0; k < columns; k += lanes<A>) store(weight + k, exp<A>(load(weight + k)));
}

template <class X, class A>
void iterate(const X* x, int64_t B, int64_t K, double T, bool first, const RowScale<A>* rows, int64_t begin,
             int64_t end, const Scratch<A>& scratch, A* bias, double* row_sums) {
  const A inverse_T = 1 / T;
  const int64_t width = scratch.width;
  bool lost = false;
  for (int64_t i = 0; i < B * lanes<A>; ++i) scratch.lane_sums[i] = 0;
  for (; begin < end; begin += width) {
    const int64_t columns = end - begin < width ? end - begin : width;
    alignas(64) A largest[kTile], weight[kTile];
    double mass[kTile];
    const auto visit = [&](auto also) {
      tile_mass(x + begin, B, K, inverse_T, bias + begin, rows, columns, mass,
                [&](int64_t b, int64_t k, vec<A> z, vec<A> p) {
                  store(scratch.p + b * width + k, p);
                  also(k, z);
                });
    };
    const auto visit_first = [&] {
      for (A& z : largest) z = -INFINITY;
      visit([&](int64_t k, vec<A> z) { store(largest + k, maximum(z, load(largest + k))); });
    };
    if (first) {
      guess_bias(x + begin, B, K, inverse_T, columns, bias + begin);
      visit_first();
      if (correct_bias(largest, columns, bias + begin)) visit_first();
      for (int64_t k = 0; k < columns; ++k) {
        if (out_of_reach(largest[k])) {  // still out of reach: |x / T| is above 1e9, and log mass is negligible
          mass[k] = 0;
          lost = true;
        }
      }
    } else {
      visit([](auto...) {});
    }
    balance(mass, columns, bias + begin, weight);
    for (int64_t b = 0; b < B; ++b) {
      vec<A> sum = load(scratch.lane_sums + b * lanes<A>);
      for (int64_t k = 0; k < columns; k += lanes<A>) sum += load(scratch.p + b * width + k) * load(weight + k);
      store(scratch.lane_sums + b * lanes<A>, sum);
    }
  }
  for (int64_t b = 0; b < B; ++b) {
    row_sums[b] = lost ? NAN : sum_of_lanes<A>(widen<A>(load(scratch.lane_sums + b * lanes<A>)));
  }
}

template <class X, class A>
void assign(const X* x, int64_t K, double T, const A* bias, A* out) {
  const A inverse_T = 1 / T;
  vec<A> max = broadcast(A(-INFINITY));
  for_each_vector<A>(0, K, [&](int64_t k, auto part) {
    max = maximum(biased(x + k, inverse_T, bias + k, part), max);
  });
  const A row_max = largest_lane<A>(max);
  wide<A> sum = {};
  for (int64_t begin = 0; begin < K; begin += kTile) {
    vec<A> tile_sum = {};
    for_each_vector<A>(begin, begin + kTile < K ? begin + kTile : K, [&](int64_t k, auto part) {
      const vec<A> z = biased(x + k, inverse_T, bias + k, part);
      const vec<A> e = exp<A>(z - row_max);
      tile_sum += e;
      store(out + k, e, part);
    });
    sum += widen<A>(tile_sum);
  }
  const A inverse_sum = 1 / sum_of_lanes<A>(sum);
  for_each_vector<A>(0, K, [&](int64_t k, auto part) { store(out + k, load(out + k, part) * inverse_sum, part); });
}

#define INSTANTIATE(X, A)                                                                                             \
  template void column_logsumexp(const X*, int64_t, int64_t, double, int64_t, int64_t, A*);                           \
  template void column_mass(const X*, int64_t, int64_t, double, const A*, const RowScale<A>*, int64_t, int64_t, A*);  \
  template void iterate(const X*, int64_t, int64_t, double, bool, const RowScale<A>*, int64_t, int64_t,               \
                        const Scratch<A>&, A*, double*);                                                              \
  template RowScale<A> row_scale(const X*, int64_t, double, const A*);                                                \
  template void assign(const X*, int64_t, double, const A*, A*);
INSTANTIATE(double, double)
INSTANTIATE(float, float)
INSTANTIATE(bf16, float)
INSTANTIATE(fp16, float)

}  // namespace CPU_TARGET
