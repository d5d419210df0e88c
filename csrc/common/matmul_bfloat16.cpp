// SPDX-License-Identifier: BSD-3-Clause
#include "common/matmul_bfloat16.h"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dynconv {

#if defined(__x86_64__)
namespace {

// ------------------------------------------------------------------------------------------------------------- AMX

#define DYNCONV_AMX __attribute__((target("amx-tile,amx-bf16")))

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
// Eight tiles of 16 rows of 64 bytes.
constexpr TileConfig kTileConfig{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

DYNCONV_AMX void configure_tiles() { _tile_loadconfig(&kTileConfig); }
DYNCONV_AMX void release_tiles() { _tile_release(); }

// M x N tiles of c, 0 to 3, from M tiles of a, 4 and 5, and N of b, 6 and 7.
template <int M, int N>
DYNCONV_AMX void amx_block(const Matmul<bfloat16, float>& x, const bfloat16* a, const bfloat16* b, float* c,
                           int64_t c_panel, bool accumulate) {
  const int64_t a_bytes = x.a_row * 2, c_bytes = x.c_row * 4;
  float* const c_low = c + kPairRows * x.c_row;
  // The intrinsics don't tell the compiler which memory they read.
  asm volatile("" ::: "memory");
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if (N == 2) _tile_loadd(1, c + c_panel, c_bytes);
    if (M == 2) _tile_loadd(2, c_low, c_bytes);
    if (M == 2 && N == 2) _tile_loadd(3, c_low + c_panel, c_bytes);
  } else {
    _tile_zero(0);
    if (N == 2) _tile_zero(1);
    if (M == 2) _tile_zero(2);
    if (M == 2 && N == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < x.depth; k += kPairDepth, a += kPairDepth, b += kPairDepth * kPairPanel) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (N == 2) {
      _tile_loadd(7, b + x.b_panel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (M == 2) {
      _tile_loadd(5, a + kPairRows * x.a_row, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (N == 2) _tile_stored(1, c + c_panel, c_bytes);
  if (M == 2) _tile_stored(2, c_low, c_bytes);
  if (M == 2 && N == 2) _tile_stored(3, c_low + c_panel, c_bytes);
}

// ------------------------------------------------------------------------------------------------------ AVX512-BF16

// ROWS x N panels of c, held in registers.
template <int ROWS, int N>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) void avx512_block(const Matmul<bfloat16, float>& x,
                                                                                  const bfloat16* a, const bfloat16* b,
                                                                                  float* c, int64_t c_panel,
                                                                                  bool accumulate) {
  __m512 sum[ROWS][N];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) sum[i][v] = accumulate ? _mm512_loadu_ps(c + i * x.c_row + v * c_panel) : _mm512_setzero_ps();
  for (int64_t k = 0; k < x.depth; k += 2, a += 2, b += 2 * kPairPanel) {
    __m512bh right[N];
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + v * x.b_panel);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      int pair;
      __builtin_memcpy(&pair, a + i * x.a_row, sizeof pair);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], left, right[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) _mm512_storeu_ps(c + i * x.c_row + v * c_panel, sum[i][v]);
}

template <int N>
void avx512_rows(const Matmul<bfloat16, float>& x, const bfloat16* b, float* c, int64_t c_panel, bool accumulate) {
  constexpr int step = N == 2 ? 8 : 16;
  for (int64_t i = 0; i < x.rows; i += step)
    avx512_block<step, N>(x, x.a + i * x.a_row, b, c + i * x.c_row, c_panel, accumulate);
}

template <int N>
void amx_rows(const Matmul<bfloat16, float>& x, const bfloat16* b, float* c, int64_t c_panel, bool accumulate) {
  int64_t i = 0;
  for (; x.rows - i > kPairRows; i += 2 * kPairRows)
    amx_block<2, N>(x, x.a + i * x.a_row, b, c + i * x.c_row, c_panel, accumulate);
  if (i < x.rows) amx_block<1, N>(x, x.a + i * x.a_row, b, c + i * x.c_row, c_panel, accumulate);
}

}  // namespace

void matmul_pairs(const Matmul<bfloat16, float>& x) {
  const bool amx = bfloat16_level() == Bfloat16Level::amx;
  const int64_t c_panel = x.c_panel ? x.c_panel : kPairPanel;
  if (!x.accumulate && x.start)
    for (int64_t i = 0; i < x.rows; ++i)
      for (int64_t column = 0; column < x.columns; column += kPairPanel) {
        float* c = x.c + i * x.c_row + column / kPairPanel * c_panel;
        std::fill(c, c + kPairPanel, x.start[i]);
      }
  const bool accumulate = x.accumulate || x.start;
  const bfloat16* b = x.b;
  float* c = x.c;
  int64_t column = 0;
  for (; x.columns - column > kPairPanel; column += 2 * kPairPanel, b += 2 * x.b_panel, c += 2 * c_panel) {
    if (amx) amx_rows<2>(x, b, c, c_panel, accumulate);
    else avx512_rows<2>(x, b, c, c_panel, accumulate);
  }
  if (column >= x.columns) return;
  if (amx) amx_rows<1>(x, b, c, c_panel, accumulate);
  else avx512_rows<1>(x, b, c, c_panel, accumulate);
}

PairUnit::PairUnit() {
  if (bfloat16_level() == Bfloat16Level::amx) configure_tiles();
}
PairUnit::~PairUnit() {
  if (bfloat16_level() == Bfloat16Level::amx) release_tiles();
}

#else

void matmul_pairs(const Matmul<bfloat16, float>&) {}
PairUnit::PairUnit() {}
PairUnit::~PairUnit() {}

#endif

}  // namespace dynconv
