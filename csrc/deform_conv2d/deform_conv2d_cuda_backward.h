// SPDX-License-Identifier: BSD-3-Clause
// What the two files of deform_conv2d's CUDA backward share: tiles of output gradients, and what a chunk of gradients of
// sampled values gives to the corners.
#pragma once

#include "deform_conv2d/deform_conv2d_cuda_tiles.h"

namespace dynconv {
namespace deform_cuda {

constexpr int kThreads = 256;

template <class T>
struct OutputGradients {
  const typename T::storage_t* data;
  ImageStrides stride;
  int group_out_channels;
  bool vectors;  // 16 bytes at once

  // One chunk of kChunk outputs o (of weight group g) of a pixel, as operands, to shared memory.
  DYNCONV_DEVICE void load_chunk(const Pixel& pixel, int g, int o, void* to) const {
    const int rest = group_out_channels - o, count = pixel.image < 0 || rest < 0 ? 0 : rest < T::kChunk ? rest : T::kChunk;
    const typename T::storage_t* const from = data + pixel.image * stride.batch +
                                              (int64_t(g) * group_out_channels + o) * stride.channel +
                                              pixel.y * stride.row + pixel.x * stride.pixel;
    typename T::acc_t v[T::kChunk];
    if (vectors) {
      ChannelChunk<T, true> chunk;
      chunk.load(from, 1, count);
      chunk.get(v);
    } else {
      ChannelChunk<T, false> chunk;
      chunk.load(from, stride.channel, count);
      chunk.get(v);
    }
    write_chunk(v, typename T::operand_t(), to);
  }

  // Rows: pixels; columns: outputs o to o + kRow.
  template <int rows>
  DYNCONV_DEVICE void load_tile(const Pixel* pixels, int g, int o, unsigned char* to) const {
    for (int i = int(threadIdx.x); i < rows * kRowChunks; i += kThreads) {
      const int row = stride.channel == 1 ? i / kRowChunks : i % rows;
      const int chunk = stride.channel == 1 ? i % kRowChunks : i / rows;
      load_chunk(pixels[row], g, o + chunk * T::kChunk, to + chunk_offset(row, chunk));
    }
  }
};

template <class T>
bool has_output_vectors(const DeformBackwardCall& call) {
  const DeformConv2dParams& p = call.forward.params;
  return has_vectors(call.grad_out, call.grad_out_channels_last, p.out_channels, p.group_out_channels(), p.out_channels,
                     T::kChunk);
}

// dots[i] += <gradient, corner i> over the chunk.
template <class T, bool vectors>
DYNCONV_DEVICE void add_dots(const Image<typename T::storage_t>& image, const Sample<typename T::acc_t>& s, int channel,
                             int count, const typename T::acc_t (&gradient)[T::kChunk], typename T::acc_t (&dots)[4]) {
  const auto* const at = first_corner(image.data, image.stride, s, channel);
  auto dot = [&](const ChannelChunk<T, vectors>& corner) {
    typename T::acc_t v[T::kChunk], sum = 0;
    corner.get(v);
    DYNCONV_UNROLL
    for (int e = 0; e < T::kChunk; ++e) sum += gradient[e] * v[e];
    return sum;
  };
  if constexpr (vectors) {
    ChannelChunk<T, true> corner[4];
    DYNCONV_UNROLL
    for (int i = 0; i < 4; ++i)
      corner[i].load(at + corner_offset(image.stride, i), 1, s.corners >> i & 1 ? count : 0);
    DYNCONV_UNROLL
    for (int i = 0; i < 4; ++i) dots[i] += dot(corner[i]);
  } else {
    // One corner after the other: numbers read one by one take many registers.
    DYNCONV_NO_UNROLL
    for (int i = 0; i < 4; ++i) {
      ChannelChunk<T, false> corner;
      corner.load(at + corner_offset(image.stride, i), image.stride.channel, s.corners >> i & 1 ? count : 0);
      const typename T::acc_t sum = dot(corner);
      DYNCONV_UNROLL
      for (int c = 0; c < 4; ++c) dots[c] += c == i ? sum : typename T::acc_t(0);
    }
  }
}

// Adds weight i times the gradient to corner i of the sums.
template <class T, bool vectors>
DYNCONV_DEVICE void scatter(typename T::acc_t* sums, const ImageStrides& stride, const Sample<typename T::acc_t>& s,
                            int channel, int count, const typename T::acc_t (&gradient)[T::kChunk]) {
  using acc_t = typename T::acc_t;
  acc_t* const first = first_corner(sums, stride, s, channel);
  DYNCONV_UNROLL
  for (int i = 0; i < 4; ++i) {
    if ((s.corners >> i & 1) == 0) continue;
    acc_t* const to = first + corner_offset(stride, i);
    const acc_t weight = s.weight[i];
    if constexpr (vectors && sizeof(acc_t) == 4) {
      if (count == 0) continue;
      DYNCONV_UNROLL
      for (int e = 0; e < T::kChunk; e += 4) {
        const float part[4] = {weight * gradient[e], weight * gradient[e + 1], weight * gradient[e + 2],
                               weight * gradient[e + 3]};
        add_global_x4(to + e, part);
      }
    } else {
      DYNCONV_UNROLL
      for (int e = 0; e < T::kChunk; ++e)
        if (e < count) add_global(to + e * stride.channel, weight * gradient[e]);
    }
  }
}

// What the gradients of input, offset and mask are made of.
struct DataArguments {
  Geometry geometry;
  Steps steps;
  const void* input;
  ImageStrides input_stride, grad_out_stride;
  const void *offset, *mask;
  StorageType offset_type;
  const void* grad_out;
  const void* packed_weight;  // (steps, output_chunks, kRow channels, kRow outputs) operands
  int output_chunks;
  bool grad_out_vectors;
  void* grad_input;                 // sums, in the layout of the input; null: not wanted, or deterministic
  void* grad_columns;               // deterministic: (rows - first_row, taps, C) sums with the mask in them
  void *grad_offset, *grad_mask;    // contiguous, in offset_type; null: not wanted
  int64_t first_row, rows;          // of all rows, those that this launch does
};

// The gradients of offset and mask at tap `tap` of offset group d, from the four products with the corners.
template <class acc_t>
DYNCONV_DEVICE void write_sample_gradients(const DataArguments& a, const Pixel& pixel, int d, int tap,
                                           const SampleExtras<acc_t>& extra, const acc_t (&dot)[4]) {
  acc_t grad_y, grad_x, grad_mask;
  sample_gradients(extra.fraction_y, extra.fraction_x, dot, extra.mask, &grad_y, &grad_x, &grad_mask);
  const int64_t plane = int64_t(a.geometry.out_height) * a.geometry.out_width;
  const int64_t place = int64_t(pixel.y) * a.geometry.out_width + pixel.x;
  const int64_t channel = (int64_t(pixel.image) * a.steps.offset_groups + d) * a.steps.taps + tap;
  if (a.grad_offset != nullptr) {
    const ScalarWriter<acc_t> to{a.grad_offset, a.offset_type};
    to.write(2 * channel * plane + place, grad_y);
    to.write((2 * channel + 1) * plane + place, grad_x);
  }
  if (a.grad_mask != nullptr) ScalarWriter<acc_t>{a.grad_mask, a.offset_type}.write(channel * plane + place, grad_mask);
}

// deform_conv2d_backward_weight.cu: gradients of weight and bias.
template <class T>
int64_t weight_workspace(const DeformBackwardCall&);
template <class T>
cudaError_t run_backward_weight(const DeformBackwardCall&, void* workspace, cudaStream_t);

}  // namespace deform_cuda
}  // namespace dynconv
