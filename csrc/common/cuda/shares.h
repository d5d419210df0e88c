// SPDX-License-Identifier: BSD-3-Clause
// Adding up what several blocks have found of the same numbers, in a fixed order.
#pragma once

#include "common/cuda/launch.h"
#include "common/cuda/operands.h"

namespace dynconv {

constexpr int kShareThreads = 256;

// out[i] = the sum of sums[share][i]. Each of a block's warps adds some of the shares of 32 numbers.
template <class storage_t, class acc_t>
__global__ void __launch_bounds__(kShareThreads)
    add_shares_kernel(const acc_t* sums, int64_t shares, int64_t count, storage_t* out) {
  constexpr int kWarps = kShareThreads / 32;
  auto* const parts = reinterpret_cast<acc_t*>(dynamic_shared());  // (warps, 32)
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t i = blockIdx.x * int64_t(32) + lane;
  acc_t sum = 0;
  if (i < count)
    for (int64_t share = warp; share < shares; share += kWarps) sum += sums[share * count + i];
  parts[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= count) return;
  for (int w = 1; w < kWarps; ++w) sum += parts[w * 32 + lane];
  from_acc(sum, out + i);
}

// sums: (shares, count); out: (count,).
template <class storage_t, class acc_t>
cudaError_t add_shares(const acc_t* sums, int64_t shares, int64_t count, storage_t* out, cudaStream_t stream) {
  return launch(add_shares_kernel<storage_t, acc_t>, ceil_div(count, 32), kShareThreads, kShareThreads * sizeof(acc_t),
                stream, sums, shares, count, out);
}

}  // namespace dynconv
