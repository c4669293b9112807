// Products of small matrices in the cache: C [rows, columns] = A [rows, n] B [n, columns], in float32.
//
// Rows of B are whole vectors. Elements of A are broadcast from memory, at any strides, so that A may be a transpose.
// An element is a float or, if the processor has bf16 dot products, a pair of bf16: neighbours along n, which then has
// half as many elements. For a processor with bf16 tiles (AMX), amx.h has the product.
#pragma once

#include "common/simd.h"

#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // as GCC calls it, and Clang
#define HAS_TILES
#endif

namespace CPU_TARGET {

using bf16_pair = uint32_t;

template <class X>
struct ElementOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct ElementOf<bf16> {
  using type = bf16_pair;
};
#endif
template <class X>
using Element = typename ElementOf<X>::type;

// Values of an element, and the elements of n values.
template <class E>
constexpr int kValues = 1;
template <>
inline constexpr int kValues<bf16_pair> = 2;
template <class E>
ALWAYS_INLINE int64_t elements(int64_t n) {
  return (n + kValues<E> - 1) / kValues<E>;
}

// Elements of n that a product takes in one step, and rows of C in one tile. A product computes whole steps and whole
// tiles: both factors hold zeros from n up to a whole step, and A and C have memory for whole tiles of rows.
template <class E>
constexpr int kStep = 1;
template <class E>
constexpr int kTileRows = 1;
#if defined(HAS_TILES)
template <>
inline constexpr int kStep<bf16_pair> = 16;
template <>
inline constexpr int kTileRows<bf16_pair> = 16;
#endif

// Values of n in one step.
template <class E>
constexpr int kStepValues = kValues<E> * kStep<E>;

ALWAYS_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A tile of C stays in registers: kHigh rows of kWide vectors, together with a row of B and an element of A.
#if defined(__AVX512F__)
constexpr int kHigh = 6, kWide = 4;  // 32 registers
#elif defined(__AVX2__)
constexpr int kHigh = 6, kWide = 2;  // 16
#else
constexpr int kHigh = 4, kWide = 2;  // 16, and products need one of them
#endif
constexpr int kPanel = kWide * lanes<float>;

template <class E>
struct Left {  // element (i, k) at data[i * row + k * step]
  const E* data;
  int64_t row, step;
};

template <class E>
struct Right {  // rows of kPanel columns, one panel after the other: element (k, j) at
  const E* data;  // data[j / kPanel * panel + k * row + j % kPanel]
  int64_t row, panel;
};

ALWAYS_INLINE vec<float> multiply_add(vec<float> a, vec<float> b, vec<float> c) { return a * b + c; }
#if defined(__AVX512BF16__)
ALWAYS_INLINE vec<float> multiply_add(vec<bf16_pair> a, vec<bf16_pair> b, vec<float> c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}
#endif

// R rows of W vectors. With `add`, the product is added to C.
template <int R, int W, class E>
__attribute__((noinline)) static void multiply_tile(Left<E> a, const E* b, int64_t b_row, int64_t n, float* c,
                                                    int64_t c_row, bool add) {
  vec<float> sum[R][W];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) sum[i][w] = add ? load(c + i * c_row + w * lanes<float>) : vec<float>{};
  }
  for (int64_t k = 0; k < n; ++k) {
    vec<E> row[W];
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) row[w] = load(b + w * lanes<E>);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const vec<E> element = broadcast(a.data[i * a.row]);
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) sum[i][w] = multiply_add(element, row[w], sum[i][w]);
    }
    a.data += a.step;
    b += b_row;
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) store(c + i * c_row + w * lanes<float>, sum[i][w]);
  }
}

// The last rows, fewer than a full tile.
template <int R, int W, class E>
ALWAYS_INLINE void multiply_rest(int64_t rows, Left<E> a, const E* b, int64_t b_row, int64_t n, float* c,
                                 int64_t c_row, bool add) {
  if constexpr (R > 0) {
    if (rows == R) return multiply_tile<R, W>(a, b, b_row, n, c, c_row, add);
    multiply_rest<R - 1, W>(rows, a, b, b_row, n, c, c_row, add);
  }
}

// W vectors of columns, of which kWide make a panel.
template <int W, class E>
ALWAYS_INLINE void multiply_panel(int64_t vectors, int64_t rows, Left<E> a, const E* b, int64_t b_row, int64_t n,
                                  float* c, int64_t c_row, bool add) {
  if constexpr (W > 0) {
    if (vectors < W) return multiply_panel<W - 1>(vectors, rows, a, b, b_row, n, c, c_row, add);
    for (; rows >= kHigh; rows -= kHigh) {
      multiply_tile<kHigh, W>(a, b, b_row, n, c, c_row, add);
      a.data += kHigh * a.row;
      c += kHigh * c_row;
    }
    multiply_rest<kHigh - 1, W>(rows, a, b, b_row, n, c, c_row, add);
  }
}

// C [rows, columns], written in whole vectors. A panel of B stays in the first-level cache for all rows.
template <class E>
static void multiply(Left<E> a, Right<E> b, int64_t n, int64_t rows, int64_t columns, float* c, int64_t c_row,
                     bool add) {
  for (; columns > 0; columns -= kPanel) {
    multiply_panel<kWide>((columns + lanes<float> - 1) / lanes<float>, rows, a, b.data, b.row, n, c, c_row, add);
    b.data += b.panel;
    c += kPanel;
  }
}

// Prepares a thread for products of E, as long as this object lives.
template <class E>
struct TileUse {
  TileUse() {}  // nothing
};

}  // namespace CPU_TARGET

#if defined(HAS_TILES)
#include "common/amx.h"
#endif
