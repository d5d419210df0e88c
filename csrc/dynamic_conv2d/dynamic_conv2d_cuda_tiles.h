// SPDX-License-Identifier: BSD-3-Clause
// What dynamic_conv2d's tiled CUDA kernels share: which pixel a tap reads, how the products' depth is cut into steps, and
// the bank in the order in which steps read it.
//
// Forward and the input's gradient are one product: a row is a pixel of the result, its depth runs over taps and channels
// of the source (the input, or the output's gradient).
#pragma once

#include "common/cuda/operands.h"
#include "dynamic_conv2d/dynamic_conv2d_cuda.h"

namespace dynconv {
namespace dynamic_cuda {

// What tiles hold: numbers as they are in memory.
template <class T>
using tile_t =
    std::conditional_t<std::is_same_v<typename T::operand_t, tfloat32>, unrounded_tfloat32, typename T::operand_t>;

// ----------------------------------------------------------------------------------------------- which pixel a tap reads

// Along one dimension. Result pixels are numbered phase by phase: those of one phase meet the same taps.
//   forward:    source = pixel * stride - padding + tap * dilation; one phase
//   transposed: source = (pixel + padding - tap * dilation) / stride where that is whole; a phase per remainder of pixel
struct Axis {
  int size, source_size;
  int taps, stride, padding, dilation;
  int phases;

  __host__ __device__ int pixel(int phase, int number) const { return phases == 1 ? number : phase + number * stride; }
  __host__ __device__ int pixels(int phase) const {
    return phases == 1 ? size : phase < size ? (size - phase + stride - 1) / stride : 0;
  }
  // The source is base(number) + offset(phase, tap), where the phase meets the tap.
  __host__ __device__ int base(int number, bool transposed) const {
    return transposed ? number : number * stride - padding;
  }
  __host__ __device__ bool meets(int phase, int tap, bool transposed) const {
    return !transposed || (phase + padding - tap * dilation) % stride == 0;
  }
  __host__ __device__ int offset(int phase, int tap, bool transposed) const {
    return transposed ? (phase + padding - tap * dilation) / stride : tap * dilation;
  }
};

// Sizes as the kernels compute with them. Each is below 2^31; places in memory are 64-bit everywhere.
struct Gather {
  Axis y, x;
  int transposed;

  static Gather forward(const DynamicConv2dParams& p) {
    return {{int(p.out_height), int(p.height), int(p.kernel_height), int(p.stride_height), int(p.padding_height),
             int(p.dilation_height), 1},
            {int(p.out_width), int(p.width), int(p.kernel_width), int(p.stride_width), int(p.padding_width),
             int(p.dilation_width), 1},
            0};
  }
  static Gather grad_input(const DynamicConv2dParams& p) {
    Gather g = forward(p);
    g.y.size = int(p.height), g.y.source_size = int(p.out_height), g.y.phases = g.y.stride;
    g.x.size = int(p.width), g.x.source_size = int(p.out_width), g.x.phases = g.x.stride;
    g.transposed = 1;
    return g;
  }
  __host__ __device__ int64_t phases() const { return int64_t(y.phases) * x.phases; }
  // Of the largest phase, which is the first.
  int64_t pixels() const { return int64_t(y.pixels(0)) * x.pixels(0); }
};

// ----------------------------------------------------------------------------------------------------------- the depth

// A step is a chunk of at most kRow channels of one tap, or, where channels are few, several taps side by side. Steps are
// numbered chunk * tap_steps + tap step: neighbouring taps read the same pixels, and follow each other.
struct Depth {
  int channels;  // of the source, of a group
  int taps;
  int row;            // kRow
  int width;          // columns that a tap has in a step
  int taps_of_step;
  int tap_steps, chunks;

  Depth(int64_t channels_, int64_t taps_, int row_)
      : channels(int(channels_)), taps(int(taps_)), row(row_), width(channels < row ? channels : row) {
    taps_of_step = row / width < taps ? row / width : taps;
    tap_steps = (taps + taps_of_step - 1) / taps_of_step;
    chunks = (channels + row - 1) / row;
  }
  __host__ __device__ int count() const { return tap_steps * chunks; }
  // Where a channel's tap is.
  __host__ __device__ int step(int channel, int tap) const { return channel / row * tap_steps + tap / taps_of_step; }
  __host__ __device__ int column(int channel, int tap) const { return channel % row + tap % taps_of_step * width; }
};

struct DepthStep {
  int first_channel, first_tap;
  int channels, taps;  // that it has; columns: tap by tap, `channels` each

  __host__ __device__ DepthStep(const Depth& d, int number) {
    const int chunk = number / d.tap_steps;
    first_channel = chunk * d.row;
    first_tap = (number - chunk * d.tap_steps) * d.taps_of_step;
    channels = d.channels - first_channel < d.width ? d.channels - first_channel : d.width;
    taps = d.taps - first_tap < d.taps_of_step ? d.taps - first_tap : d.taps_of_step;
  }
  __host__ __device__ int columns() const { return channels * taps; }
};

// ------------------------------------------------------------------------------------------------------- packed bank

// The bank as (groups, steps, K, padded_results, kRow): a step's tile of each kernel is one piece of memory, zero where
// there is no result or no column. results: output channels of a group, or (transposed) its input channels.
struct PackedBank {
  Depth depth;
  int groups, num_kernels, results, padded_results;

  int64_t numbers() const { return int64_t(groups) * depth.count() * num_kernels * padded_results * depth.row; }
};

// ------------------------------------------------------------------------------------------------------------- rows

// Whether chunks of channels can be copied 16 bytes at once.
inline bool has_vectors(const void* data, bool channels_last, int64_t group_channels, int64_t chunk) {
  return channels_last && is_aligned(data, 16) && group_channels % chunk == 0;
}

// Where a row's taps read: sources are base + the tap's offset. Rows that don't exist have image -1.
struct Place {
  int image, y, x;
};

}  // namespace dynamic_cuda
}  // namespace dynconv
