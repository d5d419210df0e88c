// SPDX-License-Identifier: BSD-3-Clause
// A matrix product of bfloat16 with float32 sums on the CPU's own instructions, for tiles that lie in the cache.
#pragma once

#include "common/cpu_level.h"
#include "common/half_types.h"
#include "common/matmul.h"

#include <type_traits>

namespace dynconv {

// What a side of the product is rounded up to: rows of a and c, columns of b and c, steps of the depth.
constexpr int64_t kPairRows = 16, kPairPanel = 16, kPairDepth = 32;

// As matmul, where
//   a        rows are contiguous, depth of them a multiple of kPairDepth; kPairRows rows may be read at a time
//   b        panels of kPairPanel columns: (depth / 2, column, 2), so that two steps of the depth are one 32-bit word
//   c        whole panels of columns and kPairRows rows are written
// What lies behind the last row or column may be anything, behind the last step of the depth it must be zero. Only
// between a PairUnit's construction and its end, on the same thread.
void matmul_pairs(const Matmul<bfloat16, float>& x);

// Readies the thread's matrix unit, if matmul_pairs uses one.
class PairUnit {
 public:
  PairUnit();
  ~PairUnit();
  PairUnit(const PairUnit&) = delete;
  PairUnit& operator=(const PairUnit&) = delete;
};

// To be held by a thread while it multiplies, by matmul_pairs or not.
struct NoPairUnit {};
template <bool pairs>
using ProductUnit = std::conditional_t<pairs, PairUnit, NoPairUnit>;

}  // namespace dynconv
