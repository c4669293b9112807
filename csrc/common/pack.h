// Packs rows into the layouts of matmul.h. In attention these are the rows of one head of one sequence, which are far
// apart in memory. Packed rows are neighbours, widened to elements, and padded with zeros.
#pragma once

#include "common/matmul.h"

namespace CPU_TARGET {

// Elements of a packed row of D values: whole vectors.
template <class E>
ALWAYS_INLINE int64_t packed_row(int64_t D) {
  return round_up(elements<E>(D), lanes<E>);
}

template <class X>
ALWAYS_INLINE void pack_row(const X* x, int64_t D, float* out) {
  for_each_vector<float>(0, D, [&](int64_t d, auto part) { store(out + d, load(x + d, part)); });
}

ALWAYS_INLINE void pack_row(const bf16* x, int64_t D, bf16_pair* out) {
  for (; D >= 2 * lanes<bf16_pair>; D -= 2 * lanes<bf16_pair>, x += 2 * lanes<bf16_pair>, out += lanes<bf16_pair>) {
    memcpy(out, x, kVectorBytes);
  }
  if (D > 0) {
    store(out, vec<bf16_pair>{});
    memcpy(out, x, D * sizeof(bf16));
  }
}

// n rows x of D values, `stride` apart, followed by rows of zeros up to a multiple of `multiple`.
template <class X, class E>
static void pack_rows(const X* x, int64_t stride, int64_t n, int64_t D, E* out, int64_t multiple = 1) {
  const int64_t row = packed_row<E>(D);
  for (int64_t i = 0; i < n; ++i) pack_row(x + i * stride, D, out + i * row);
  memset(out + n * row, 0, (round_up(n, multiple) - n) * row * sizeof(E));
}

// ---- rows as the right factor with n along them: unchanged, or with every two rows of bf16 zipped into pairs

// n rows of `row` elements, n a multiple of kValues. Returns the result; its rows are kValues times as long.
ALWAYS_INLINE const float* zip_rows(const float* rows, int64_t, int64_t, float*) { return rows; }

#if defined(__AVX512BF16__)
static inline const bf16_pair* zip_rows(const bf16_pair* rows, int64_t row, int64_t n, bf16_pair* out) {
  using Halves = VectorOf<uint16_t, kVectorBytes>::type;
  using Pairs = Shuffle<2 * lanes<bf16_pair>>;
  for (int64_t i = 0; i < n; i += 2) {
    for (int64_t d = 0; d < row; d += lanes<bf16_pair>) {
      const Halves a = (Halves)load(rows + i * row + d);
      const Halves b = (Halves)load(rows + (i + 1) * row + d);
      store(out + i * row + 2 * d, Pairs::zip_low(a, b));
      store(out + i * row + 2 * d + lanes<bf16_pair>, Pairs::zip_high(a, b));
    }
  }
  return out;
}
#endif

template <class E>
ALWAYS_INLINE Right<E> rows_as_right(const E* zipped, int64_t D) {
  return {zipped, kValues<E> * packed_row<E>(D), kPanel};
}

// ---- the transpose as the right factor, with n along the values of a row

template <class E>
ALWAYS_INLINE Right<E> transpose_as_right(const E* transpose, int64_t D) {
  return {transpose, kPanel, packed_row<E>(D) * kPanel};
}

// Transposes a square.
template <class E>
ALWAYS_INLINE void transpose_square(vec<E> (&square)[lanes<E>]) {
  constexpr int L = lanes<E>;
  // Zipping the first half of the rows with the second moves a bit of the row's number to the lane's.
#pragma GCC unroll 4
  for (int moved = 1; moved < L; moved *= 2) {
    vec<E> zipped[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      zipped[2 * i] = Shuffle<L>::zip_low(square[i], square[i + L / 2]);
      zipped[2 * i + 1] = Shuffle<L>::zip_high(square[i], square[i + L / 2]);
    }
    memcpy(square, zipped, sizeof square);
  }
}

// The transpose of n packed rows of D values, n a multiple of the lanes.
template <class E>
static void transpose_rows(const E* rows, int64_t n, int64_t D, E* out) {
  constexpr int L = lanes<E>;
  const int64_t row = packed_row<E>(D);
  for (int64_t j = 0; j < n; j += L) {
    for (int64_t d = 0; d < row; d += L) {
      vec<E> square[L];
      for (int i = 0; i < L; ++i) square[i] = load(rows + (j + i) * row + d);
      transpose_square<E>(square);
      E* corner = out + j / kPanel * kPanel * row + d * kPanel + j % kPanel;
      for (int i = 0; i < L; ++i) store(corner + i * kPanel, square[i]);
    }
  }
}

// ---- the transpose as the left factor, with n along the zipped rows

// The transpose of n rows of `row` zipped columns, `columns` of which become rows; `out` has memory for whole tiles.
template <class E>
ALWAYS_INLINE Left<E> transpose_as_left(const E* zipped, int64_t row, int64_t, int64_t, E*) {
  return {zipped, 1, row};
}

#if defined(HAS_TILES)
static inline Left<bf16_pair> transpose_as_left(const bf16_pair* zipped, int64_t row, int64_t n, int64_t columns,
                                                bf16_pair* out) {
  constexpr int L = lanes<bf16_pair>;
  const int64_t out_row = round_up(n, L);
  for (int64_t j = 0; j < columns; j += L) {
    for (int64_t k = 0; k < n; k += L) {
      vec<bf16_pair> square[L];
      for (int i = 0; i < L; ++i) square[i] = load(zipped + (k + i) * row + j);
      transpose_square<bf16_pair>(square);
      for (int i = 0; i < L; ++i) store(out + (j + i) * out_row + k, square[i]);
    }
  }
  return {out, out_row, 1};
}
#endif

}  // namespace CPU_TARGET
