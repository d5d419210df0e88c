// SPDX-License-Identifier: BSD-3-Clause
// What matmul.inl computes.
#pragma once

#include <cstdint>

namespace dynconv {

// c (rows, columns) = a (rows, depth) * b (depth, columns), or += if accumulate. Columns of b and c are contiguous;
// b is cut into panels of the kernel's panel width, b_panel elements apart.
template <class acc_t>
struct Matmul {
  int64_t rows, columns, depth;
  const acc_t* a;
  int64_t a_row, a_step;
  const acc_t* b;
  int64_t b_step, b_panel;
  bool b_padded;  // whether the last panel may be read in full
  acc_t* c;
  int64_t c_row;
  bool accumulate;
};

}  // namespace dynconv
