#include "attention/cpu_kernels.h"

#include <math.h>

#include "common/pack.h"
#include "common/exp.h"

namespace CPU_TARGET {

// Queries in a block of the forward pass and of the backward pass, where sums over queries go through memory. Both are
// whole tiles of rows; in the backward pass they are also whole steps of n.
template <class E>
constexpr int kQueries = kTileRows<E> > 1 ? 2 * kTileRows<E> : 24;
template <class E>
constexpr int kGradQueries = kStep<E> > 1 ? 2 * kStepValues<E> : 48;
constexpr int kGradKeys = 384;  // keys in a block of the backward pass: their data stay in the second-level cache

constexpr int64_t kAheadBytes = 256 << 10;  // limit for a prefetch of the next head: both fit the second-level cache

ALWAYS_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Stride of a row of scores in floats: an odd number of vectors, so that a column spreads over the cache.
ALWAYS_INLINE int64_t score_row(int64_t keys) {
  return round_up(keys, 2 * lanes<float>) + lanes<float>;
}

// The same for rows of P or dS as a left factor: floats replace the scores, rows of pairs are half as long.
template <class E>
ALWAYS_INLINE int64_t factor_row(int64_t keys) {
  return kValues<E> == 1 ? score_row(keys) : score_row(elements<E>(keys));
}

// Hands out consecutive pieces of a workspace.
struct Pieces {
  char* next;

  template <class T>
  T* take(int64_t n) {
    T* piece = reinterpret_cast<T*>(next);
    next += round_up(n * sizeof(T), 64);
    return piece;
  }
};

ALWAYS_INLINE void store_factors(float* row, int64_t j, vec<float> x) { store(row + j, x); }
[[maybe_unused]] ALWAYS_INLINE void store_factors(bf16_pair* row, int64_t j, vec<float> x) {
  store(reinterpret_cast<bf16*>(row) + j, x);
}

// Writes zeros after the n values of a row, from the end of their last vector to a whole step.
template <class E>
ALWAYS_INLINE void end_factors(E* row, int64_t n) {
  for (int64_t j = round_up(n, lanes<float>); j < round_up(n, kStepValues<E>); j += lanes<float>) {
    store_factors(row, j, vec<float>{});
  }
}

template <class X>
ALWAYS_INLINE void store_row(const float* x, float factor, int64_t D, X* out) {
  for_each_vector<float>(0, D, [&](int64_t d, auto part) { store(out + d, load(x + d) * factor, part); });
}

// ---- forward

template <class E>
struct ForwardWorkspace {
  E *rows, *k_transpose, *v, *q, *p;
  float *scores, *out;
  char* end;

  ForwardWorkspace(void* memory, int64_t N, int64_t D) {
    Pieces pieces{static_cast<char*>(memory)};
    const int64_t row = packed_row<E>(D), keys = round_up(N, kPanel);
    rows = pieces.take<E>(keys * row);
    k_transpose = pieces.take<E>(keys * row);
    v = kValues<E> == 1 ? rows : pieces.take<E>(round_up(N, kStepValues<E>) * row);
    q = pieces.take<E>(kQueries<E> * row);
    scores = pieces.take<float>(kQueries<E> * score_row(N));
    p = kValues<E> == 1 ? reinterpret_cast<E*>(scores) : pieces.take<E>(kQueries<E> * factor_row<E>(N));
    out = pieces.take<float>(kQueries<E> * kValues<E> * row);
    end = pieces.next;
  }
};

struct RowSum {
  float max, sum;
};

// Turns a row of products into p = exp(scale * s - max), and zeros up to a whole step.
template <class E>
ALWAYS_INLINE RowSum exp_row(const float* s, int64_t N, float scale, E* p) {
  vec<float> lane_max = broadcast(-INFINITY);
  for_each_vector<float>(0, N, [&](int64_t j, auto part) {
    lane_max = maximum(keep(load(s + j) * scale, part, -INFINITY), lane_max);
  });
  const float max = largest_lane<float>(lane_max);
  vec<float> sum = {};
  for_each_vector<float>(0, N, [&](int64_t j, auto part) {
    const vec<float> x = exp<float>(keep(load(s + j) * scale - max, part, -INFINITY));
    sum += x;
    store_factors(p, j, x);
  });
  end_factors(p, N);
  return {max, sum_of_lanes(sum)};
}

// Prefetches values of token i into the second-level cache. An address outside the tensor is not an error.
template <class X>
ALWAYS_INLINE void prefetch(Tokens<const X> x, int64_t i, int64_t values) {
  constexpr int64_t kLine = 64 / sizeof(X);
  for (int64_t d = 0; d < values; d += kLine) __builtin_prefetch(x.data + i * x.stride + d, 0, 2);
}

template <class X>
void attention_forward(HeadShape shape, Head<X> head, Head<X> next, int64_t begin, int64_t end, Tokens<X> out,
                       float* lse, void* workspace) {
  using E = Element<X>;
  const auto [N, D, scale] = shape;
  const auto [q, k, v] = head;
  // Q, K and V are prefetched in turns: a core can wait for a few lines at a time only, and arithmetic must not stop.
  const int64_t ahead = 3 * N * D * static_cast<int64_t>(sizeof(X)) <= kAheadBytes ? D : 0;
  const ForwardWorkspace<E> w(workspace, N, D);
  const TileUse<E> tiles;
  const int64_t row = packed_row<E>(D), s_row = score_row(N), p_row = factor_row<E>(N), out_row = kValues<E> * row;

  pack_rows(k.data, k.stride, N, D, w.rows, lanes<E>);
  transpose_rows(w.rows, round_up(N, lanes<E>), D, w.k_transpose);
  pack_rows(v.data, v.stride, N, D, w.rows, kStepValues<E>);
  const Right<E> k_right = transpose_as_right(w.k_transpose, D);
  const Right<E> v_right = rows_as_right(zip_rows(w.rows, row, round_up(N, kStepValues<E>), w.v), D);

  for (; begin < end; begin += kQueries<E>) {
    const int64_t rows = min(kQueries<E>, end - begin);
    pack_rows(q.data + begin * q.stride, q.stride, rows, D, w.q);
    for (int64_t i = 0; i < rows; ++i) prefetch(next.q, begin + i, ahead);
    multiply(Left<E>{w.q, row, 1}, k_right, elements<E>(D), rows, N, w.scores, s_row, false);
    RowSum sums[kQueries<E>];
    for (int64_t i = 0; i < rows; ++i) {
      sums[i] = exp_row(w.scores + i * s_row, N, scale, w.p + i * p_row);
      prefetch(next.k, begin + i, ahead);
    }
    multiply(Left<E>{w.p, p_row, 1}, v_right, elements<E>(N), rows, D, w.out, out_row, false);
    for (int64_t i = 0; i < rows; ++i) {
      store_row(w.out + i * out_row, 1 / sums[i].sum, D, out.data + (begin + i) * out.stride);
      lse[begin + i] = sums[i].max + logf(sums[i].sum);
      prefetch(next.v, begin + i, ahead);
    }
  }
}

// ---- backward

template <class E>
struct BackwardWorkspace {
  E *rows, *k, *k_transpose, *v_transpose, *q, *q_zipped, *grad, *grad_zipped, *p, *ds, *zipped, *left;
  float *delta, *scores, *dp, *dq, *dk, *dv;
  char* end;

  BackwardWorkspace(void* memory, int64_t N, int64_t D) {
    constexpr bool zips = kValues<E> > 1;
    Pieces pieces{static_cast<char*>(memory)};
    const int64_t row = packed_row<E>(D), keys = min(N, kGradKeys), padded = round_up(keys, kPanel);
    const int64_t sum_row = kValues<E> * row, queries = kGradQueries<E>;
    rows = pieces.take<E>(padded * row);
    k_transpose = pieces.take<E>(padded * row);
    v_transpose = pieces.take<E>(padded * row);
    k = pieces.take<E>(padded * row);
    q = pieces.take<E>(queries * row);
    grad = pieces.take<E>(queries * row);
    scores = pieces.take<float>(queries * score_row(keys));
    dp = pieces.take<float>(queries * score_row(keys));
    p = zips ? pieces.take<E>(queries * factor_row<E>(keys)) : reinterpret_cast<E*>(scores);
    ds = zips ? pieces.take<E>(queries * factor_row<E>(keys)) : reinterpret_cast<E*>(dp);
    q_zipped = zips ? pieces.take<E>(queries * row) : q;
    grad_zipped = zips ? pieces.take<E>(queries * row) : grad;
    zipped = pieces.take<E>(zips ? queries * factor_row<E>(keys) : 0);
    left = pieces.take<E>(kTileRows<E> > 1 ? padded * elements<E>(queries) : 0);
    delta = pieces.take<float>(N);
    dq = pieces.take<float>(round_up(N, kTileRows<E>) * sum_row);
    dk = pieces.take<float>(round_up(keys, kTileRows<E>) * sum_row);
    dv = pieces.take<float>(round_up(keys, kTileRows<E>) * sum_row);
    end = pieces.next;
  }
};

template <class X>
ALWAYS_INLINE float dot(const X* a, const X* b, int64_t D) {
  vec<float> sum = {};
  for_each_vector<float>(0, D, [&](int64_t d, auto part) { sum += load(a + d, part) * load(b + d, part); });
  return sum_of_lanes(sum);
}

// From rows of products s and dp: p = exp(scale * s - lse) and ds = p (dp - delta), and zeros up to a whole step.
template <class E>
ALWAYS_INLINE void grad_row(const float* s, const float* dp, int64_t keys, float scale, float lse, float delta, E* p,
                            E* ds) {
  for_each_vector<float>(0, keys, [&](int64_t j, auto part) {
    const vec<float> p_j = exp<float>(keep(load(s + j) * scale - lse, part, -INFINITY));
    const vec<float> ds_j = p_j * keep(load(dp + j) - delta, part, 0);
    store_factors(p, j, p_j);
    store_factors(ds, j, ds_j);
  });
  end_factors(p, keys);
  end_factors(ds, keys);
}

template <class X>
void attention_backward(HeadShape shape, Tokens<const X> grad, Tokens<const X> q, Tokens<const X> k,
                        Tokens<const X> v, Tokens<const X> out, const float* lse, Tokens<X> dq, Tokens<X> dk,
                        Tokens<X> dv, void* workspace) {
  using E = Element<X>;
  const auto [N, D, scale] = shape;
  const BackwardWorkspace<E> w(workspace, N, D);
  const TileUse<E> tiles;
  const int64_t row = packed_row<E>(D), sum_row = kValues<E> * row;
  const Right<E> k_transpose = transpose_as_right(w.k_transpose, D), v_transpose = transpose_as_right(w.v_transpose, D);

  for (int64_t i = 0; i < N; ++i) w.delta[i] = dot(grad.data + i * grad.stride, out.data + i * out.stride, D);

  for (int64_t first_key = 0; first_key < N; first_key += kGradKeys) {
    const int64_t keys = min(kGradKeys, N - first_key);
    const int64_t s_row = score_row(keys), p_row = factor_row<E>(keys);
    pack_rows(v.data + first_key * v.stride, v.stride, keys, D, w.rows, lanes<E>);
    transpose_rows(w.rows, round_up(keys, lanes<E>), D, w.v_transpose);
    pack_rows(k.data + first_key * k.stride, k.stride, keys, D, w.rows, kPanel);
    transpose_rows(w.rows, round_up(keys, lanes<E>), D, w.k_transpose);
    const Right<E> k_right = rows_as_right(zip_rows(w.rows, row, round_up(keys, kStepValues<E>), w.k), D);

    for (int64_t begin = 0; begin < N; begin += kGradQueries<E>) {
      const int64_t rows = min(kGradQueries<E>, N - begin), step_rows = round_up(rows, kStepValues<E>);
      pack_rows(q.data + begin * q.stride, q.stride, rows, D, w.q, kStepValues<E>);
      pack_rows(grad.data + begin * grad.stride, grad.stride, rows, D, w.grad, kStepValues<E>);
      multiply(Left<E>{w.q, row, 1}, k_transpose, elements<E>(D), rows, keys, w.scores, s_row, false);
      multiply(Left<E>{w.grad, row, 1}, v_transpose, elements<E>(D), rows, keys, w.dp, s_row, false);
      for (int64_t i = 0; i < rows; ++i) {
        grad_row(w.scores + i * s_row, w.dp + i * s_row, keys, scale, lse[begin + i], w.delta[begin + i],
                 w.p + i * p_row, w.ds + i * p_row);
      }
      multiply(Left<E>{w.ds, p_row, 1}, k_right, elements<E>(keys), rows, D, w.dq + begin * sum_row, sum_row,
               first_key > 0);
      memset(w.p + rows * p_row, 0, (step_rows - rows) * p_row * sizeof(E));
      memset(w.ds + rows * p_row, 0, (step_rows - rows) * p_row * sizeof(E));
      const Right<E> grad_right = rows_as_right(zip_rows(w.grad, row, step_rows, w.grad_zipped), D);
      const Right<E> q_right = rows_as_right(zip_rows(w.q, row, step_rows, w.q_zipped), D);
      const auto transpose = [&](const E* x) {
        const E* pairs = zip_rows(x, p_row, step_rows, w.zipped);
        return transpose_as_left(pairs, kValues<E> * p_row, elements<E>(step_rows), keys, w.left);
      };
      multiply(transpose(w.p), grad_right, elements<E>(rows), keys, D, w.dv, sum_row, begin > 0);
      multiply(transpose(w.ds), q_right, elements<E>(rows), keys, D, w.dk, sum_row, begin > 0);
    }
    for (int64_t j = 0; j < keys; ++j) {
      store_row(w.dk + j * sum_row, scale, D, dk.data + (first_key + j) * dk.stride);
      store_row(w.dv + j * sum_row, 1, D, dv.data + (first_key + j) * dv.stride);
    }
  }
  for (int64_t i = 0; i < N; ++i) store_row(w.dq + i * sum_row, scale, D, dq.data + i * dq.stride);
}

template <class X>
int64_t attention_forward_workspace(int64_t N, int64_t D) {
  return ForwardWorkspace<Element<X>>(nullptr, N, D).end - static_cast<char*>(nullptr);
}

template <class X>
int64_t attention_backward_workspace(int64_t N, int64_t D) {
  return BackwardWorkspace<Element<X>>(nullptr, N, D).end - static_cast<char*>(nullptr);
}

#define INSTANTIATE(X)                                                                                               \
  template int64_t attention_forward_workspace<X>(int64_t, int64_t);                                                 \
  template int64_t attention_backward_workspace<X>(int64_t, int64_t);                                                \
  template void attention_forward(HeadShape, Head<X>, Head<X>, int64_t, int64_t, Tokens<X>, float*, void*);          \
  template void attention_backward(HeadShape, Tokens<const X>, Tokens<const X>, Tokens<const X>, Tokens<const X>,    \
                                   Tokens<const X>, const float*, Tokens<X>, Tokens<X>, Tokens<X>, void*);
INSTANTIATE(float)
INSTANTIATE(bf16)
INSTANTIATE(fp16)

}  // namespace CPU_TARGET
