// SPDX-License-Identifier: BSD-3-Clause
// What deform_conv2d's CUDA kernels share: how the products' depth is cut into steps, where a tap samples, and tiles of
// samples and of output gradients in shared memory.
//
// Rows of a tile are output pixels m = n * Ho*Wo + p, through all images. The depth (channels x taps) is cut into steps:
// a weight group g, an offset group d that it meets, a tap, and a chunk of at most kRow channels that belong to both.
#pragma once

#include "common/cuda/operands.h"
#include "deform_conv2d/deform_conv2d_cuda.h"

namespace dynconv {
namespace deform_cuda {

DYNCONV_DEVICE float floor_of(float value) { return floorf(value); }
DYNCONV_DEVICE double floor_of(double value) { return floor(value); }
#include "deform_conv2d/deform_conv2d_math.h"

// ------------------------------------------------------------------------------------------------------------ steps

// Steps are numbered ((g * segments + d - first d of g) * taps + tap) * chunks + chunk; where groups cross, some numbers
// stand for no step.
struct Steps {
  int groups, offset_groups, group_channels, offset_channels, group_out_channels, taps;
  int row;       // channels of a chunk
  int segments;  // most offset groups that a weight group meets
  int chunks;    // most chunks of a segment

  Steps(const DeformConv2dParams& p, int row_)
      : groups(int(p.groups)),
        offset_groups(int(p.offset_groups)),
        group_channels(int(p.group_channels())),
        offset_channels(int(p.channels / p.offset_groups)),
        group_out_channels(int(p.group_out_channels())),
        taps(int(p.taps())),
        row(row_) {
    const int cg = group_channels, cd = offset_channels;
    segments = cd % cg == 0 ? 1 : cg % cd == 0 ? cg / cd : cg / cd + 2;
    chunks = ((cg < cd ? cg : cd) + row - 1) / row;
  }
  __host__ __device__ int64_t count() const { return int64_t(groups) * segments * taps * chunks; }
  __host__ __device__ int first_offset_group(int g) const { return int(int64_t(g) * group_channels / offset_channels); }
  __host__ __device__ int first_group(int d) const { return int(int64_t(d) * offset_channels / group_channels); }
  // Channels that g and d share: begin() to end(), none if they don't meet.
  __host__ __device__ int begin(int g, int d) const {
    const int a = g * group_channels, b = d * offset_channels;
    return a > b ? a : b;
  }
  __host__ __device__ int end(int g, int d) const {
    const int a = (g + 1) * group_channels, b = (d + 1) * offset_channels;
    return a < b ? a : b;
  }
};

struct Step {
  int g, d, tap, chunk;

  __host__ __device__ Step(int g_, int d_, int tap_, int chunk_) : g(g_), d(d_), tap(tap_), chunk(chunk_) {}
  __host__ __device__ Step(const Steps& s, int number) {
    chunk = number % s.chunks;
    number /= s.chunks;
    tap = number % s.taps;
    number /= s.taps;
    g = number / s.segments;
    d = s.first_offset_group(g) + number % s.segments;
  }
  __host__ __device__ int number(const Steps& s) const {
    return ((g * s.segments + d - s.first_offset_group(g)) * s.taps + tap) * s.chunks + chunk;
  }
  // The first channel, and how many there are: none for a number that stands for no step.
  __host__ __device__ int channel(const Steps& s) const { return s.begin(g, d) + chunk * s.row; }
  __host__ __device__ int channels(const Steps& s) const {
    const int rest = g < s.groups && d < s.offset_groups ? s.end(g, d) - channel(s) : 0;
    return rest < 0 ? 0 : rest < s.row ? rest : s.row;
  }
  // The next step of weight group g: chunks first, then taps, then offset groups. False after the last.
  __host__ __device__ bool advance_in_group(const Steps& s) {
    if (!next_chunk(s)) {
      chunk = 0;
      if (++tap == s.taps) tap = 0, ++d;
    }
    return channels(s) > 0;
  }
  // The next step of offset group d and this tap: chunks first, then weight groups. False after the last.
  __host__ __device__ bool advance_in_tap(const Steps& s) {
    if (!next_chunk(s)) chunk = 0, ++g;
    return channels(s) > 0;
  }

 private:
  __host__ __device__ bool next_chunk(const Steps& s) { return s.begin(g, d) + ++chunk * s.row < s.end(g, d); }
};

// ------------------------------------------------------------------------------------------------- where taps sample

// Where a row's tap samples. Corners are numbered as in deform_conv2d_math.h.
template <class acc_t>
struct alignas(16) Sample {
  int image, top, left;
  int corners;      // bit i: corner i is inside the image, and may be read
  acc_t weight[4];  // of the corners, without the mask; all 0 for a sample outside, NaN for a NaN coordinate
};
template <class acc_t>
struct SampleExtras {
  acc_t mask, fraction_y, fraction_x;
};

// Sizes as the kernels compute with them. Each is below 2^31 (has_device_sizes); places in memory are 64-bit everywhere.
struct Geometry {
  int height, width, out_height, out_width, taps, kernel_width;
  int stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;
  int64_t offset_stride[4], mask_stride[4];

  explicit Geometry(const DeformConv2dParams& p)
      : height(int(p.height)),
        width(int(p.width)),
        out_height(int(p.out_height)),
        out_width(int(p.out_width)),
        taps(int(p.taps())),
        kernel_width(int(p.kernel_width)),
        stride_height(int(p.stride_height)),
        stride_width(int(p.stride_width)),
        padding_height(int(p.padding_height)),
        padding_width(int(p.padding_width)),
        dilation_height(int(p.dilation_height)),
        dilation_width(int(p.dilation_width)) {
    for (int i = 0; i < 4; ++i) offset_stride[i] = p.offset_stride[i], mask_stride[i] = p.mask_stride[i];
  }
};

// A row of a tile: an output pixel. image is -1 beyond the last row.
struct Pixel {
  int image, y, x;

  __device__ Pixel(const Geometry& g, int64_t m, int64_t rows) {
    const int64_t at = m < rows ? m : 0, pixels = int64_t(g.out_height) * g.out_width;
    image = int(at / pixels);
    const int64_t pixel = at - image * pixels;
    y = int(pixel / g.out_width);
    x = int(pixel - int64_t(y) * g.out_width);
    if (m >= rows) image = -1;
  }
};

template <class acc_t>
struct SampleSource {
  ScalarReader<acc_t> offset, mask;

  __device__ Sample<acc_t> sample(const Geometry& g, const Pixel& pixel, int d, int tap,
                                  SampleExtras<acc_t>* extras) const {
    const bool exists = pixel.image >= 0;
    const int n = exists ? pixel.image : 0;
    const int i = tap / g.kernel_width, j = tap - i * g.kernel_width;
    const int64_t channel = int64_t(d) * g.taps + tap;
    const int64_t at = n * g.offset_stride[0] + 2 * channel * g.offset_stride[1] + pixel.y * g.offset_stride[2] +
                       pixel.x * g.offset_stride[3];
    const acc_t y = acc_t(pixel.y * g.stride_height - g.padding_height + i * g.dilation_height) + offset[at];
    const acc_t x =
        acc_t(pixel.x * g.stride_width - g.padding_width + j * g.dilation_width) + offset[at + g.offset_stride[1]];
    BilinearSample<acc_t> s;
    const bool inside = bilinear_sample(y, x, acc_t(g.height), acc_t(g.width), &s);
    Sample<acc_t> result;
    result.image = n;
    result.top = int(s.top);
    result.left = int(s.left);
    const bool top = result.top >= 0, left = result.left >= 0;
    const bool bottom = result.top + 1 < g.height, right = result.left + 1 < g.width;
    result.corners = int(top && left) | int(top && right) << 1 | int(bottom && left) << 2 | int(bottom && right) << 3;
    if (!inside || !exists) result.corners = 0;
    DYNCONV_UNROLL
    for (int c = 0; c < 4; ++c) result.weight[c] = exists ? s.weight[c] : acc_t(0);
    extras->mask = acc_t(1);
    if (mask.data != nullptr)
      extras->mask = mask[n * g.mask_stride[0] + channel * g.mask_stride[1] + pixel.y * g.mask_stride[2] +
                          pixel.x * g.mask_stride[3]];
    extras->fraction_y = s.fraction_y;
    extras->fraction_x = s.fraction_x;
    return result;
  }

  // With the mask in the weights.
  __device__ Sample<acc_t> modulated_sample(const Geometry& g, const Pixel& pixel, int d, int tap) const {
    SampleExtras<acc_t> extras;
    Sample<acc_t> result = sample(g, pixel, d, tap, &extras);
    DYNCONV_UNROLL
    for (int c = 0; c < 4; ++c) result.weight[c] = pixel.image >= 0 ? result.weight[c] * extras.mask : acc_t(0);
    return result;
  }
};

// ------------------------------------------------------------------------------------------------------------ chunks

template <class storage_t>
struct Image {
  const storage_t* data;
  ImageStrides stride;
};

// Where corner 0 of a sample is, at a channel.
template <class number_t, class acc_t>
DYNCONV_DEVICE number_t* first_corner(number_t* data, const ImageStrides& stride, const Sample<acc_t>& s, int channel) {
  return data + s.image * stride.batch + channel * stride.channel + s.top * stride.row + s.left * stride.pixel;
}
DYNCONV_DEVICE int64_t corner_offset(const ImageStrides& stride, int corner) {
  return (corner & 1 ? stride.pixel : 0) + (corner & 2 ? stride.row : 0);
}

// A chunk of sampled values: fetched, then (other work in between) summed and written as operands.
template <class T, bool vectors>
struct SampledChunk;

template <class T>
struct SampledChunk<T, true> {
  ChannelChunk<T, true> corner[4];

  DYNCONV_DEVICE void fetch(const Image<typename T::storage_t>& image, const Sample<typename T::acc_t>& s, int channel,
                            int count) {
    const auto* const at = first_corner(image.data, image.stride, s, channel);
    DYNCONV_UNROLL
    for (int i = 0; i < 4; ++i)
      corner[i].load(at + corner_offset(image.stride, i), 1, s.corners >> i & 1 ? count : 0);
  }
  DYNCONV_DEVICE void write(const Image<typename T::storage_t>&, const Sample<typename T::acc_t>& s, int, int,
                            void* to) const {
    typename T::acc_t sum[T::kChunk] = {};
    DYNCONV_UNROLL
    for (int i = 0; i < 4; ++i) {
      typename T::acc_t v[T::kChunk];
      corner[i].get(v);
      DYNCONV_UNROLL
      for (int e = 0; e < T::kChunk; ++e) sum[e] += s.weight[i] * v[e];
    }
    write_chunk(sum, typename T::operand_t(), to);
  }
};

// Numbers that are read one by one would take too many registers if all four corners waited for each other.
template <class T>
struct SampledChunk<T, false> {
  DYNCONV_DEVICE void fetch(const Image<typename T::storage_t>&, const Sample<typename T::acc_t>&, int, int) {}
  DYNCONV_DEVICE void write(const Image<typename T::storage_t>& image, const Sample<typename T::acc_t>& s, int channel,
                            int count, void* to) const {
    const auto* const at = first_corner(image.data, image.stride, s, channel);
    typename T::acc_t sum[T::kChunk] = {};
    DYNCONV_NO_UNROLL
    for (int i = 0; i < 4; ++i) {
      ChannelChunk<T, false> corner;
      corner.load(at + corner_offset(image.stride, i), image.stride.channel, s.corners >> i & 1 ? count : 0);
      typename T::acc_t v[T::kChunk];
      corner.get(v);
      const typename T::acc_t weight = s.weight[i];
      DYNCONV_UNROLL
      for (int e = 0; e < T::kChunk; ++e) sum[e] += weight * v[e];
    }
    write_chunk(sum, typename T::operand_t(), to);
  }
};

// Whether chunks can be read 16 bytes at once: channels fastest, and every segment begins and ends at a whole chunk.
inline bool has_vectors(const void* data, bool channels_last, int64_t channels, int64_t group_channels,
                        int64_t offset_channels, int64_t chunk) {
  return channels_last && is_aligned(data, 16) && channels % chunk == 0 && group_channels % chunk == 0 &&
         offset_channels % chunk == 0;
}

// -------------------------------------------------------------------------------------------------- packed weight

// The weight of output o of a step's weight group at the step's channel `column`, 0 where there is none.
template <class T>
DYNCONV_DEVICE typename T::operand_t weight_operand(const Steps& s, const Step& step, const typename T::storage_t* weight,
                                                    int o, int column) {
  if (column >= step.channels(s) || o >= s.group_out_channels) return {};
  const int64_t out_channel = int64_t(step.g) * s.group_out_channels + o;
  const int channel = step.channel(s) + column - step.g * s.group_channels;
  return as_operand<typename T::storage_t, typename T::operand_t>(
      weight[(out_channel * s.group_channels + channel) * s.taps + step.tap]);
}

}  // namespace deform_cuda
}  // namespace dynconv
