// SPDX-License-Identifier: BSD-3-Clause
// Sums over pixels: what the gradient of a bias is made of.
#pragma once

#include "common/cuda/launch.h"
#include "common/cuda/operands.h"

namespace dynconv {

constexpr int kPixelSumThreads = 256;

// sums[share][o]: the sum of output o of an image over a share of the pixels of all samples. A warp adds one output's pixels where these are
// neighbours, else a lane does, so that lanes read neighbours either way.
template <class T>
__global__ void __launch_bounds__(kPixelSumThreads)
    pixel_sums_kernel(const typename T::storage_t* image, ImageStrides stride, int64_t pixels, int64_t rows,
                      int64_t rows_of_share, int outputs, typename T::acc_t* sums) {
  using acc_t = typename T::acc_t;
  constexpr int kWarps = kPixelSumThreads / 32;
  auto* const parts = reinterpret_cast<acc_t*>(dynamic_shared());  // (warps, 32)
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int tiles = (outputs + 31) / 32;
  const int first = int(blockIdx.x % unsigned(tiles)) * 32;
  const int64_t share = blockIdx.x / unsigned(tiles);
  const int64_t begin = share * rows_of_share, end = begin + rows_of_share < rows ? begin + rows_of_share : rows;
  // The sum of output o over pixels first, first + step, ... of the share.
  auto add = [&](int o, int64_t first, int step) {
    acc_t sum = 0;
    int64_t n = first / pixels, pixel = first - n * pixels;
    for (int64_t m = first; m < end; m += step, pixel += step) {
      while (pixel >= pixels) pixel -= pixels, ++n;
      sum += to_acc(image[n * stride.batch + o * stride.channel + pixel * stride.pixel]);
    }
    return sum;
  };
  if (stride.channel == 1) {
    parts[warp * 32 + lane] = first + lane < outputs ? add(first + lane, begin + warp, kWarps) : acc_t(0);
    __syncthreads();
    if (warp == 0 && first + lane < outputs) {
      acc_t sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += parts[w * 32 + lane];
      sums[share * outputs + first + lane] = sum;
    }
  } else {
    for (int o = first + warp; o < first + 32 && o < outputs; o += kWarps) {
      acc_t sum = add(o, begin + lane, 32);
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane == 0) sums[share * outputs + o] = sum;
    }
  }
}

// sums: (shares, outputs). rows: pixels of all samples; each share is rows_of_share of them, in order.
template <class T>
cudaError_t launch_pixel_sums(const typename T::storage_t* image, const ImageStrides& stride, int64_t pixels,
                              int64_t rows, int64_t rows_of_share, int outputs, typename T::acc_t* sums,
                              cudaStream_t stream) {
  return launch(pixel_sums_kernel<T>, ceil_div(rows, rows_of_share) * ceil_div(outputs, 32), kPixelSumThreads,
                kPixelSumThreads * sizeof(typename T::acc_t), stream, image, stride, pixels, rows, rows_of_share, outputs,
                sums);
}

}  // namespace dynconv
