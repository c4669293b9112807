#include "sinkhorn/cpu_kernels.h"

#include <math.h>

#include "common/exp.h"

namespace CPU_TARGET {

// Values that one step takes at a time: rows of a column, vectors of a row. They share one rescaling of the sum so far.
constexpr int kStep = 8;
// Columns that a pass down the rows carries along; their sums stay in the first-level cache.
constexpr int kTile = 1024;

// An online log-sum-exp of scale * x, lane by lane: N more values x for a running maximum of x and the sum of
// exp(scale * (x - max)).
template <class A, int N>
ALWAYS_INLINE void add_values(const vec<A> (&x)[N], A scale, vec<A>& max, wide<A>& sum) {
  vec<A> new_max = max;
  for (int i = 0; i < N; ++i) new_max = maximum(x[i], new_max);
  // While all values are -inf, any finite number in place of the maximum avoids inf - inf.
  const vec<A> shift = new_max == broadcast(A(-INFINITY)) ? vec<A>{} : new_max;
  vec<A> added = exp_of_nonpositive<A>((x[0] - shift) * scale);
  for (int i = 1; i < N; ++i) added += exp_of_nonpositive<A>((x[i] - shift) * scale);
  sum = sum * widen<A>(exp_of_nonpositive<A>((max - shift) * scale)) + widen<A>(added);
  max = new_max;
}

template <int N, class X, class A>
ALWAYS_INLINE void add_rows(const X* x, int64_t K, A inverse_T, int64_t columns, A* max, double* sum) {
  for_each_vector<A>(0, columns, [&](int64_t k, auto part) {
    vec<A> rows[N], max_k = load(max + k);
    wide<A> sum_k = load_wide<A>(sum + k);
    for (int b = 0; b < N; ++b) rows[b] = load(x + b * K + k, part);
    add_values<A, N>(rows, inverse_T, max_k, sum_k);
    store(max + k, max_k);
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
    A max[kTile];
    double sum[kTile] = {};
    for (A& m : max) m = -INFINITY;
    int64_t b = 0;
    for (; b + kStep <= B; b += kStep) add_rows<kStep>(x + b * K + begin, K, inverse_T, columns, max, sum);
    for (; b < B; ++b) add_rows<1>(x + b * K + begin, K, inverse_T, columns, max, sum);
    for (int64_t k = 0; k < columns; ++k) out[begin + k] = max[k] / T + log_of(static_cast<A>(sum[k]));
  }
}

template <class X, class A>
RowScale<A> row_scale(const X* x, int64_t K, double T, const A* bias) {
  const A inverse_T = 1 / T;
  vec<A> max = broadcast(A(-INFINITY));
  wide<A> sum = {};
  int64_t k = 0;
  for (; k + kStep * lanes<A> <= K; k += kStep * lanes<A>) {
    vec<A> z[kStep];
    for (int i = 0; i < kStep; ++i) z[i] = load(x + k + i * lanes<A>) * inverse_T + load(bias + k + i * lanes<A>);
    add_values<A, kStep>(z, 1, max, sum);
  }
  for_each_vector<A>(k, K, [&](int64_t k, auto part) {
    const vec<A> z[1] = {load(x + k, part) * inverse_T + load(bias + k, part, -INFINITY)};
    add_values<A, 1>(z, 1, max, sum);
  });
  const A row_max = largest_lane<A>(max);
  sum *= widen<A>(exp_of_nonpositive<A>(max - row_max));
  double total = 0;
  for (int lane = 0; lane < lanes<A>; ++lane) total += sum[lane];
  return {row_max, static_cast<A>(1 / total)};
}

template <int N, class X, class A>
ALWAYS_INLINE void add_mass(const X* x, int64_t K, A inverse_T, const A* bias, const RowScale<A>* rows,
                            int64_t columns, double* mass) {
  for_each_vector<A>(0, columns, [&](int64_t k, auto part) {
    const vec<A> bias_k = load(bias + k, part);
    vec<A> added = {};
    for (int b = 0; b < N; ++b) {
      const vec<A> z = load(x + b * K + k, part) * inverse_T + bias_k;
      added += exp_of_nonpositive<A>(z - rows[b].max) * rows[b].inverse_sum;
    }
    store(mass + k, load_wide<A>(mass + k) + widen<A>(added));
  });
}

template <class X, class A>
void column_mass(const X* x, int64_t B, int64_t K, double T, const A* bias, const RowScale<A>* rows, int64_t begin,
                 int64_t end, A* out) {
  const A inverse_T = 1 / T;
  for (; begin < end; begin += kTile) {
    const int64_t columns = end - begin < kTile ? end - begin : kTile;
    double mass[kTile] = {};
    int64_t b = 0;
    for (; b + kStep <= B; b += kStep) {
      add_mass<kStep>(x + b * K + begin, K, inverse_T, bias + begin, rows + b, columns, mass);
    }
    for (; b < B; ++b) add_mass<1>(x + b * K + begin, K, inverse_T, bias + begin, rows + b, columns, mass);
    for (int64_t k = 0; k < columns; ++k) out[begin + k] = static_cast<A>(mass[k]);
  }
}

template <class X, class A>
void assign(const X* x, int64_t K, double T, const A* bias, RowScale<A> row, A* out) {
  const A inverse_T = 1 / T;
  for_each_vector<A>(0, K, [&](int64_t k, auto part) {
    const vec<A> z = load(x + k, part) * inverse_T + load(bias + k, part);
    store(out + k, exp_of_nonpositive<A>(z - row.max) * row.inverse_sum, part);
  });
}

#define INSTANTIATE(X, A)                                                                                             \
  template void column_logsumexp(const X*, int64_t, int64_t, double, int64_t, int64_t, A*);                           \
  template void column_mass(const X*, int64_t, int64_t, double, const A*, const RowScale<A>*, int64_t, int64_t, A*);  \
  template RowScale<A> row_scale(const X*, int64_t, double, const A*);                                                \
  template void assign(const X*, int64_t, double, const A*, RowScale<A>, A*);
INSTANTIATE(double, double)
INSTANTIATE(float, float)
INSTANTIATE(bf16, float)
INSTANTIATE(fp16, float)

}  // namespace CPU_TARGET
