#include "prototype_cross_entropy/cpu_kernels.h"

#include <math.h>

#include "common/exp.h"

namespace CPU_TARGET {

// Number of columns whose terms are added in A; the sums of these tiles are added in double.
constexpr int64_t kTile = 1024;

// Calls body(k, part) for the vectors of every tile, and end_of_tile() after each tile.
template <class A, class Body, class EndOfTile>
ALWAYS_INLINE void for_each_tile(int64_t c, Body body, EndOfTile end_of_tile) {
  for (int64_t begin = 0; begin < c; begin += kTile) {
    for_each_vector<A>(begin, begin + kTile < c ? begin + kTile : c, body);
    end_of_tile();
  }
}

// z = t / T + bias, and -inf past the end of a row. Every pass over a row must round z in the same way, or z - maximum
// would not be exact for constant z. The loads come first, so that all passes fuse multiplication and addition.
template <class X, class A, class WholeOrPart>
ALWAYS_INLINE vec<A> biased(const X* t, A inverse_T, const A* bias, WholeOrPart part) {
  const vec<A> t_k = load(t, part), bias_k = load(bias, part, A(-INFINITY));
  return t_k * inverse_T + bias_k;
}

// v in the lanes of the part, `fill` in those outside it.
template <class A>
ALWAYS_INLINE vec<A> fill_outside(vec<A> v, Whole, A) {
  return v;
}

template <class A>
ALWAYS_INLINE vec<A> fill_outside(vec<A> v, Part part, A fill) {
  vec<A> filled = broadcast(fill);
  memcpy(&filled, &v, part.n * sizeof(A));
  return filled;
}

template <class X, class A>
TargetNorm<A> target_norm(const X* t, const A* bias, int64_t c, double T) {
  const A inverse_T = 1 / T;
  vec<A> lane_maximum = broadcast(A(-INFINITY));
  for_each_vector<A>(0, c, [&](int64_t k, auto part) {
    lane_maximum = maximum(biased(t + k, inverse_T, bias + k, part), lane_maximum);
  });
  const A largest = largest_lane<A>(lane_maximum);
  vec<A> tile_total = {};
  wide<A> total = {};
  for_each_tile<A>(
      c,
      [&](int64_t k, auto part) { tile_total += exp<A>(biased(t + k, inverse_T, bias + k, part) - largest); },
      [&] {
        total += widen<A>(tile_total);
        tile_total = vec<A>{};
      });
  return {largest, static_cast<A>(sum_of_lanes<A>(total))};
}

template <class X, class A>
void targets(const X* t, const A* bias, TargetNorm<A> norm, int64_t c, double T, const X* next, A* q) {
  const A inverse_T = 1 / T, inverse_total = 1 / norm.total;
  for_each_vector<A>(0, c, [&](int64_t k, auto part) {
    __builtin_prefetch(next + k);
    const vec<A> z = biased(t + k, inverse_T, bias + k, part);
    store(q + k, exp<A>(z - norm.maximum) * inverse_total, part);
  });
}

// Q, the sum of the rows of q that are in the index; 0 past the end of a row.
template <class A, class WholeOrPart>
ALWAYS_INLINE vec<A> sum_of_targets(const A* q, const int64_t* index, int64_t J, int64_t c, int64_t k,
                                    WholeOrPart part) {
  vec<A> sum = load(q + index[0] * c + k, part, A(0));
  for (int64_t j = 1; j < J; ++j) sum += load(q + index[j] * c + k, part, A(0));
  return sum;
}

template <class X, class A>
RowState<A> accumulate(RowState<A> state, const X* s, const A* q, const int64_t* index, int64_t J, int64_t c,
                       double T) {
  const A inverse_T = 1 / T;
  vec<A> lane_maximum = broadcast(state.maximum);
  for_each_vector<A>(0, c, [&](int64_t k, auto part) {
    lane_maximum = maximum(fill_outside<A>(load(s + k, part), part, state.maximum), lane_maximum);
  });
  const A largest = largest_lane<A>(lane_maximum);
  vec<A> tile_total = {}, tile_mass = {}, tile_cross = {};
  wide<A> total = {}, mass = {}, cross = {};
  for_each_tile<A>(
      c,
      [&](int64_t k, auto part) {
        const vec<A> centred = load(s + k, part) - largest, sum = sum_of_targets(q, index, J, c, k, part);
        tile_total += zero_outside(exp<A>(centred * inverse_T), part);
        tile_mass += sum;
        tile_cross += sum * centred;
      },
      [&] {
        total += widen<A>(tile_total), mass += widen<A>(tile_mass), cross += widen<A>(tile_cross);
        tile_total = tile_mass = tile_cross = vec<A>{};
      });
  const A rise = largest - state.maximum;
  const A kept = exp<A>(broadcast(-rise * inverse_T))[0];
  return {largest, static_cast<A>(state.total * kept + sum_of_lanes<A>(total)),
          static_cast<A>(state.mass + sum_of_lanes<A>(mass)),
          static_cast<A>(state.cross - state.mass * rise + sum_of_lanes<A>(cross))};
}

template <class X, class A>
void gradient(RowState<A> state, const A* q, const int64_t* index, int64_t J, A scale, int64_t c, double T, X* s) {
  const A inverse_T = 1 / T, mass_of_p = state.mass / state.total;
  for_each_vector<A>(0, c, [&](int64_t k, auto part) {
    const vec<A> p = exp<A>((load(s + k, part) - state.maximum) * inverse_T) * mass_of_p;
    store(s + k, (p - sum_of_targets(q, index, J, c, k, part)) * scale, part);
  });
}

#define INSTANTIATE(X, A)                                                                                             \
  template TargetNorm<A> target_norm(const X*, const A*, int64_t, double);                                            \
  template void targets(const X*, const A*, TargetNorm<A>, int64_t, double, const X*, A*);                            \
  template RowState<A> accumulate(RowState<A>, const X*, const A*, const int64_t*, int64_t, int64_t, double);         \
  template void gradient(RowState<A>, const A*, const int64_t*, int64_t, A, int64_t, double, X*);
INSTANTIATE(double, double)
INSTANTIATE(float, float)
INSTANTIATE(bf16, float)
INSTANTIATE(fp16, float)

}  // namespace CPU_TARGET
