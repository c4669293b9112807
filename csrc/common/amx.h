// Products of bf16 in tiles (Intel AMX). One instruction makes 16 rows of 16 floats from 16 rows of 16 pairs and 16
// pairs of 16 columns. Part of matmul.h. The compiler does not know these registers or their loads and stores, so the
// assembly declares that it touches memory.
#pragma once

#include "common/matmul.h"

namespace CPU_TARGET {

constexpr int kTile = kTileRows<bf16_pair>;
static_assert(kTile == kStep<bf16_pair> && kTile == lanes<float>, "tiles are square, and a vector wide");

// Configures the thread's tiles with their full size. Restores the old configuration, which may be another library's.
template <>
struct TileUse<bf16_pair> {
  struct alignas(64) Shape {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Shape before;

  TileUse() {
    Shape whole;
    whole.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      whole.row_bytes[tile] = kTile * sizeof(bf16_pair);
      whole.rows[tile] = kTile;
    }
    asm volatile("sttilecfg %0" : "=m"(before));
    asm volatile("ldtilecfg %0" : : "m"(whole));
  }
  ~TileUse() { asm volatile("ldtilecfg %0" : : "m"(before)); }
  TileUse(const TileUse&) = delete;
};

template <int tile>
ALWAYS_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

template <int tile, class X>
ALWAYS_INLINE void tile_load(const X* x, int64_t row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(x), "r"(row * sizeof(X)), "i"(tile) : "memory");
}

template <int tile>
ALWAYS_INLINE void tile_store(float* x, int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(x), "r"(row * sizeof(float)), "i"(tile) : "memory");
}

template <int c, int a, int b>
ALWAYS_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

// One or two tiles of rows by one or two of columns: C in registers 0 to 3, A in 4 and 5, B in 6 and 7.
template <bool tall, bool wide>
ALWAYS_INLINE void multiply_tiles(Left<bf16_pair> a, const bf16_pair* b, int64_t b_row, int64_t n, float* c,
                                  int64_t c_row, bool add) {
  float* below = c + kTile * c_row;
  if (add) {
    tile_load<0>(c, c_row);
    if constexpr (wide) tile_load<1>(c + kTile, c_row);
    if constexpr (tall) tile_load<2>(below, c_row);
    if constexpr (tall && wide) tile_load<3>(below + kTile, c_row);
  } else {
    tile_zero<0>();
    if constexpr (wide) tile_zero<1>();
    if constexpr (tall) tile_zero<2>();
    if constexpr (tall && wide) tile_zero<3>();
  }
  for (int64_t k = 0; k < n; k += kTile) {
    tile_load<4>(a.data + k, a.row);
    tile_load<6>(b + k * b_row, b_row);
    tile_multiply_add<0, 4, 6>();
    if constexpr (wide) {
      tile_load<7>(b + k * b_row + kTile, b_row);
      tile_multiply_add<1, 4, 7>();
    }
    if constexpr (tall) {
      tile_load<5>(a.data + kTile * a.row + k, a.row);
      tile_multiply_add<2, 5, 6>();
    }
    if constexpr (tall && wide) tile_multiply_add<3, 5, 7>();
  }
  tile_store<0>(c, c_row);
  if constexpr (wide) tile_store<1>(c + kTile, c_row);
  if constexpr (tall) tile_store<2>(below, c_row);
  if constexpr (tall && wide) tile_store<3>(below + kTile, c_row);
}

// As in matmul.h. The pairs of a row of A are neighbours: its step is 1.
static inline void multiply(Left<bf16_pair> a, Right<bf16_pair> b, int64_t n, int64_t rows, int64_t columns, float* c,
                            int64_t c_row, bool add) {
  for (int64_t j = 0; j < columns; j += 2 * kTile) {
    const bf16_pair* right = b.data + j / kPanel * b.panel + j % kPanel;
    const bool wide = columns - j > kTile;
    for (int64_t i = 0; i < rows; i += 2 * kTile) {
      const Left<bf16_pair> left{a.data + i * a.row, a.row, 1};
      float* corner = c + i * c_row + j;
      if (rows - i > kTile) {
        wide ? multiply_tiles<true, true>(left, right, b.row, n, corner, c_row, add)
             : multiply_tiles<true, false>(left, right, b.row, n, corner, c_row, add);
      } else {
        wide ? multiply_tiles<false, true>(left, right, b.row, n, corner, c_row, add)
             : multiply_tiles<false, false>(left, right, b.row, n, corner, c_row, add);
      }
    }
  }
}

}  // namespace CPU_TARGET
