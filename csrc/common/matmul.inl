// SPDX-License-Identifier: BSD-3-Clause
// A matrix product with its sums in registers, for tiles that lie in the cache: included after simd.inl. It saves the
// packing that a library's product must do on every call, and reads its left factor with any strides.

// Columns of the right factor that are held in registers at a time.
template <class acc_t>
constexpr int64_t kPanel = 2 * Simd<acc_t>::lanes;
// Rows of it: as many sums as hide the latency of a fused multiply-add, and fit the registers.
template <int VECTORS>
constexpr int kMatmulRows = DYNCONV_LEVEL == 2 ? (VECTORS == 2 ? 12 : 16) : 8 / VECTORS;

// ROWS x VECTORS vectors of c from row first and column 0 of b on; of the last vector, tail elements (all of them if 0).
template <int ROWS, int VECTORS, class acc_t>
DYNCONV_INLINE void matmul_block(const Matmul<acc_t>& x, int64_t first, const acc_t* b, acc_t* c, int64_t tail) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  c += first * x.c_row;
  Vec<acc_t> sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      const acc_t* at = c + i * x.c_row + v * lanes;
      if (!x.accumulate) sum[i][v] = Vec<acc_t>{} + (x.start ? x.start[first + i] : acc_t(0));
      else sum[i][v] = v + 1 == VECTORS && tail ? load_partial<acc_t>(at, tail) : load(at);
    }
  const bool partial = tail && !x.b_padded;
  // Three rows a pointer: base, base + row and base + 2 * row are addressing modes, so that no address is spilled.
  constexpr int bases = (ROWS + 2) / 3;
  const acc_t* base[bases];
  const int64_t row = x.a_row, step = x.a_step;
#pragma GCC unroll 6
  for (int j = 0; j < bases; ++j) base[j] = x.a + (first + 3 * j) * row;
  for (int64_t k = 0; k < x.depth; ++k, b += x.b_step) {
    Vec<acc_t> right[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v)
      right[v] = v + 1 == VECTORS && partial ? load_partial<acc_t>(b + v * lanes, tail) : load(b + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const acc_t left = base[i / 3][i % 3 * row];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[i][v] += left * right[v];
    }
#pragma GCC unroll 6
    for (int j = 0; j < bases; ++j) base[j] += step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      acc_t* at = c + i * x.c_row + v * lanes;
      if (v + 1 == VECTORS && tail) store_partial<acc_t>(at, sum[i][v], tail);
      else store(at, sum[i][v]);
    }
}

template <int VECTORS, class acc_t>
DYNCONV_INLINE void matmul_rows(const Matmul<acc_t>& x, const acc_t* b, acc_t* c, int64_t tail) {
  constexpr int most = kMatmulRows<VECTORS>;
  for (int64_t i = 0; i < x.rows;) {
    const int64_t rest = x.rows - i;
    if (rest == most || rest >= most + (most > 8 ? 8 : 1)) {
      matmul_block<most, VECTORS>(x, i, b, c, tail);
      i += most;
    } else if (most > 8 && rest >= 8) {
      matmul_block<8, VECTORS>(x, i, b, c, tail);
      i += 8;
    } else if (most > 4 && rest >= 4) {
      matmul_block<4, VECTORS>(x, i, b, c, tail);
      i += 4;
    } else if (rest >= 2) {
      matmul_block<2, VECTORS>(x, i, b, c, tail);
      i += 2;
    } else {
      matmul_block<1, VECTORS>(x, i, b, c, tail);
      i += 1;
    }
  }
}

template <class acc_t>
void matmul(const Matmul<acc_t>& x) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  const int64_t c_panel = x.c_panel ? x.c_panel : kPanel<acc_t>;
  const acc_t* b = x.b;
  acc_t* c = x.c;
  for (int64_t column = 0; column < x.columns; column += kPanel<acc_t>, b += x.b_panel, c += c_panel) {
    const int64_t rest = x.columns - column;
    if (rest >= kPanel<acc_t>) matmul_rows<2>(x, b, c, 0);
    else if (rest > lanes) matmul_rows<2>(x, b, c, rest - lanes);
    else matmul_rows<1>(x, b, c, rest == lanes ? 0 : rest);
  }
}

// Lays (depth, columns) with the given strides out in panels of kPanel columns, zero behind the last.
template <class from_t, class acc_t>
void pack_panels(const from_t* from, int64_t step, int64_t column_step, int64_t depth, int64_t columns, acc_t* to) {
  for (int64_t first = 0; first < columns; first += kPanel<acc_t>)
    for (int64_t k = 0; k < depth; ++k, to += kPanel<acc_t>)
      for (int64_t j = 0; j < kPanel<acc_t>; ++j) {
        if (first + j < columns) convert(from[k * step + (first + j) * column_step], to + j);
        else to[j] = acc_t(0);
      }
}
