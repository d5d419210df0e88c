// SPDX-License-Identifier: BSD-3-Clause
// What both directions of deform_conv2d on the CPU share: the table of loops, how a call is cut, and its operands.
//
// Tiles of output pixels are sampled into columns that stay in the cache, and multiplied with the weight there. Nothing
// of the size of all columns is ever allocated.
#pragma once

#include "common/buffer.h"
#include "common/half_types.h"
#include "common/matmul.h"
#include "common/matmul_bfloat16.h"
#include "common/rounding.h"
#include "deform_conv2d/deform_conv2d.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

namespace dynconv {

// The image that the loops sample: channels fastest, and what a corner outside reads instead.
template <class storage_t>
struct DeformImage {
  const storage_t* pixels;    // (H * W, C)
  const storage_t* zero_row;  // C zeros
};

// A matrix in memory; one of the strides is 1.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride;
};

// How a tile's columns lie: their groups, and the distances of pixels and of groups.
struct ColumnLayout {
  int64_t groups, row, group;
};

// storage_t is what the tensors hold, acc_t what is computed in, gemm_t what the matrix product multiplies: acc_t, or
// bfloat16 where the CPU has instructions for that.
template <class storage_t, class acc_t, class gemm_t>
struct DeformKernels {
  int64_t scratch_bytes;  // a tap, for the two tile functions
  void (*sample_tile)(const DeformConv2dParams&, DeformImage<storage_t>, ScalarReader<acc_t> offset,
                      ScalarReader<acc_t> mask, int64_t n, int64_t begin, int64_t count, ColumnLayout layout,
                      void* scratch, gemm_t* columns);
  void (*scatter_tile)(const DeformConv2dParams&, DeformImage<storage_t>, ScalarReader<acc_t> offset,
                       ScalarReader<acc_t> mask, int64_t n, int64_t begin, int64_t count, ColumnLayout layout,
                       void* scratch, const acc_t* grad_columns, acc_t* grad_input, ScalarWriter<acc_t> grad_offset,
                       ScalarWriter<acc_t> grad_mask);
  void (*depthwise_tile)(int64_t count, int64_t taps, int64_t channels, const gemm_t* columns, const acc_t* weight,
                         const acc_t* bias, acc_t* out);
  void (*depthwise_backward_tile)(int64_t count, int64_t taps, int64_t channels, const acc_t* grad_out,
                                  const acc_t* weight, const gemm_t* columns, acc_t* grad_columns,
                                  acc_t* grad_weight);
  void (*matmul)(const Matmul<gemm_t, acc_t>&);
  void (*pack_panels)(const gemm_t*, int64_t step, int64_t column_step, int64_t depth, int64_t columns, gemm_t* to);
  int64_t panel;  // columns of a panel of matmul
  void (*pack_image)(const storage_t*, int64_t, storage_t*, int64_t, int64_t, int64_t);
  void (*pack_weight)(const storage_t*, int64_t, gemm_t*, int64_t, int64_t, int64_t);
  void (*unpack_image)(const acc_t*, int64_t, storage_t*, int64_t, int64_t, int64_t);
  void (*pack_grad_out)(const storage_t*, int64_t, acc_t*, int64_t, int64_t, int64_t);
  void (*to_storage)(const acc_t*, storage_t*, int64_t);
  void (*to_acc)(const storage_t*, acc_t*, int64_t);
  void (*add_acc_row)(const acc_t*, acc_t*, int64_t);
  void (*add_storage_row)(const storage_t*, acc_t*, int64_t);
  acc_t (*sum_row)(const storage_t*, int64_t);
};

namespace deform {

// Columns of a tile fill about this much of a core's second-level cache.
constexpr int64_t kTileBytes = 384 * 1024;
// Channels-first images are turned over in chunks of about this size.
constexpr int64_t kChunkBytes = 16 * 1024 * 1024;
// Pixels of an image that a thread turns over or adds up at a time, so that one large image keeps all of them busy.
constexpr int64_t kSlicePixels = 1024;
// Threads that share an image each have a gradient of it, up to this much together.
constexpr int64_t kPartialBytes = 512 * 1024 * 1024;

// The loops for the instruction set in use.
template <class storage_t, class acc_t, class gemm_t>
const DeformKernels<storage_t, acc_t, gemm_t>& kernels();

// How one call is cut: chunks of images, tiles of pixels.
struct Schedule {
  int64_t threads, chunk_images, tile_pixels, tiles;

  // row_unit: tiles are multiples of it.
  Schedule(const DeformConv2dParams& p, int64_t storage_size, int64_t acc_size, int64_t row_unit) {
    threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    const int64_t fit = kTileBytes / std::max<int64_t>(1, p.taps() * p.channels * acc_size);
    tile_pixels = std::clamp<int64_t>(fit / 16 * 16, 32, 512);
    // Small maps: enough tiles for every thread, all of about the same size.
    const int64_t wanted = std::max<int64_t>(ceil_div(p.out_pixels(), tile_pixels),
                                             std::min(ceil_div(threads, std::max<int64_t>(1, p.batch)),
                                                      ceil_div(p.out_pixels(), 16)));
    tile_pixels = round_up(ceil_div(p.out_pixels(), wanted), row_unit);
    tiles = ceil_div(p.out_pixels(), tile_pixels);
    const int64_t image_bytes = p.in_pixels() * p.channels * storage_size;
    chunk_images = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, image_bytes));
    if (chunk_images > threads) chunk_images = chunk_images / threads * threads;
    chunk_images = std::min(chunk_images, p.batch);
  }
};

// Whether the layer is depthwise with one output a channel: its product is done in the sampling's own layout.
inline bool is_depthwise(const DeformConv2dParams& p) { return p.groups == p.channels && p.out_channels == p.channels; }

template <class storage_t, class acc_t, class gemm_t>
class DeformCall {
 public:
  // Whether matmul_pairs multiplies, which wants whole blocks; else matmul.inl.
  static constexpr bool pairs = !std::is_same_v<gemm_t, acc_t>;
  static constexpr int64_t row_unit = pairs ? 2 * kPairRows : 12, depth_unit = pairs ? kPairDepth : 1;
  static_assert(row_unit % depth_unit == 0 && depth_unit % kPairPanel * pairs == 0);
  using Kernels = DeformKernels<storage_t, acc_t, gemm_t>;

  DeformCall(const DeformConv2dParams& params, const storage_t* input, ScalarReader<acc_t> offset,
             ScalarReader<acc_t> mask, const storage_t* weight)
      : p(params),
        k(kernels<storage_t, acc_t, gemm_t>()),
        schedule(params, sizeof(storage_t), sizeof(acc_t), row_unit),
        depthwise(is_depthwise(params)),
        width(depthwise ? params.taps() * params.channels : round_up(params.taps() * params.group_channels(), depth_unit)),
        outs(depthwise ? 1 : round_up(params.group_out_channels(), depth_unit)),
        layout{depthwise ? 1 : params.groups, width, schedule.tile_pixels * width},
        input_(input),
        offset_(offset),
        mask_(mask),
        zero_row_(params.channels) {
    static_assert(!pairs || std::is_same_v<storage_t, gemm_t>);
    zero_row_.zero();
    if (!p.channels_last) packed_ = Buffer<storage_t>(schedule.chunk_images * image_size());
    const int64_t taps = p.taps(), cg = p.group_channels();
    if (depthwise) {  // (tap, channel)
      weight_acc_ = Buffer<acc_t>(p.channels * taps);
      k.pack_grad_out(weight, taps, weight_acc_.data(), p.channels, p.channels, taps);
    } else {  // (output channel, tap, channel of the group)
      weight_ = Buffer<gemm_t>(p.out_channels * cg * taps);
      torch::stable::parallel_for(0, p.out_channels, 1 + 65536 / (taps * cg), [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; ++o)
          k.pack_weight(weight + o * cg * taps, taps, weight_.data() + o * cg * taps, cg, cg, taps);
      });
    }
  }

  int64_t image_size() const { return p.in_pixels() * p.channels; }
  int64_t columns_size() const { return layout.groups * layout.group; }
  // Columns of a tile, to be filled by sample(); what lies behind a pixel's columns stays zero.
  Buffer<gemm_t> new_columns() const {
    Buffer<gemm_t> columns(columns_size());
    if (pairs) columns.zero();
    return columns;
  }

  // Makes images [first, first + count) readable through image().
  void begin_chunk(int64_t first, int64_t count) {
    chunk_first_ = first;
    if (p.channels_last) return;
    const int64_t slices = ceil_div(p.in_pixels(), kSlicePixels);
    torch::stable::parallel_for(0, count * slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / slices, from = i % slices * kSlicePixels;
        const int64_t pixels = std::min(kSlicePixels, p.in_pixels() - from);
        k.pack_image(input_ + (first + n) * image_size() + from, p.in_pixels(),
                     packed_.data() + n * image_size() + from * p.channels, p.channels, p.channels, pixels);
      }
    });
  }

  DeformImage<storage_t> image(int64_t n) const {
    return {p.channels_last ? input_ + n * image_size() : packed_.data() + (n - chunk_first_) * image_size(),
            zero_row_.data()};
  }

  int64_t scratch_size() const { return k.scratch_bytes * p.taps(); }

  void sample(int64_t n, int64_t begin, int64_t count, void* scratch, gemm_t* columns) const {
    k.sample_tile(p, image(n), offset_, mask_, n, begin, count, layout, scratch, columns);
  }

  // Lays each group's weight out as panels of its transpose (taps * channels, output channels), or of itself.
  void make_panels(bool transposed) {
    const int64_t rows = p.group_out_channels(), taken = p.taps() * p.group_channels();
    const int64_t columns = transposed ? rows : taken, panels = ceil_div(columns, k.panel);
    panel_size_ = (transposed ? width : outs) * k.panel;
    group_panels_ = panels * panel_size_;
    panels_ = Buffer<gemm_t>(p.groups * group_panels_);
    torch::stable::parallel_for(0, p.groups * panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % panels * k.panel;
        const gemm_t* from = weight_.data() + i / panels * rows * taken + first * (transposed ? taken : 1);
        k.pack_panels(from, transposed ? 1 : taken, transposed ? taken : 1, transposed ? taken : rows,
                      std::min(k.panel, columns - first), panels_.data() + i * panel_size_);
      }
    });
  }

  using Unit = ProductUnit<pairs>;

  const DeformConv2dParams& p;
  const Kernels& k;
  const Schedule schedule;
  const bool depthwise;
  const int64_t width, outs;  // columns of a pixel and outputs, of a group, rounded up for the product
  const ColumnLayout layout;

 protected:
  const storage_t* input_;
  ScalarReader<acc_t> offset_, mask_;
  Buffer<storage_t> zero_row_, packed_;
  Buffer<gemm_t> weight_;
  Buffer<acc_t> weight_acc_;
  Buffer<gemm_t> panels_;
  int64_t panel_size_ = 0, group_panels_ = 0;  // elements of a panel, and of a group's panels
  int64_t chunk_first_ = 0;
};

// A tile of an (N, O, Ho, Wo) tensor as a matrix (output channel of the group, pixel).
template <class T>
Matrix<T> tile_of(const DeformConv2dParams& p, bool channels_last, T* data, int64_t n, int64_t begin, int64_t count,
                  int64_t group) {
  const int64_t rows = p.group_out_channels(), pixels = p.out_pixels(), o = group * rows;
  if (channels_last) return {data + (n * pixels + begin) * p.out_channels + o, rows, count, 1, p.out_channels};
  return {data + (n * p.out_channels + o) * pixels + begin, rows, count, pixels, 1};
}

}  // namespace deform
}  // namespace dynconv
