// SPDX-License-Identifier: BSD-3-Clause
// What matmul.inl computes.
#pragma once

#include <cstdint>

namespace dynconv {

// c (rows, columns) = a (rows, depth) * b (depth, columns). Columns of b are contiguous, cut into panels of the kernel's
// panel width, b_panel elements apart.
template <class factor_t, class acc_t = factor_t>
struct Matmul {
  int64_t rows, columns, depth;
  const factor_t* a;
  int64_t a_row, a_step;
  const factor_t* b;
  int64_t b_step, b_panel;
  bool b_padded;  // whether the last panel may be read in full
  acc_t* c;
  int64_t c_row;
  bool accumulate;  // whether the sums start at c; else at start, or at zero
  const acc_t* start = nullptr;  // a value for each row
  int64_t c_panel = 0;  // distance of c's panels; 0: their columns are contiguous
};

}  // namespace dynconv
