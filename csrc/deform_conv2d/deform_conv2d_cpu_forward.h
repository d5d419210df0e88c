// SPDX-License-Identifier: BSD-3-Clause
// Forward pass of deform_conv2d on the CPU.
#pragma once

#include "deform_conv2d/deform_conv2d_cpu.h"

namespace dynconv::deform {

template <class storage_t, class acc_t, class gemm_t>
class DeformForward : public DeformCall<storage_t, acc_t, gemm_t> {
  using Base = DeformCall<storage_t, acc_t, gemm_t>;

 public:
  using Base::Base, Base::p, Base::k, Base::schedule, Base::width, Base::outs;

  void run(const storage_t* bias, storage_t* out) {
    // A group's output channels are followed by zeros up to `outs`.
    const int64_t rows = this->depthwise ? p.out_channels : p.group_out_channels();
    bias_ = Buffer<acc_t>(this->depthwise ? p.out_channels : p.groups * outs);
    bias_.zero();
    if (bias)
      for (int64_t o = 0, g = 0; o < p.out_channels; o += rows, ++g) k.to_acc(bias + o, bias_.data() + g * outs, rows);
    if (!this->depthwise) this->make_panels(true);
    for (int64_t first = 0; first < p.batch; first += schedule.chunk_images) {
      const int64_t count = std::min(schedule.chunk_images, p.batch - first);
      this->begin_chunk(first, count);
      torch::stable::parallel_for(0, count * schedule.tiles, 1, [&](int64_t begin, int64_t end) {
        [[maybe_unused]] typename Base::Unit unit;
        Buffer<gemm_t> columns = this->new_columns();
        Buffer<char> scratch(this->scratch_size());
        // (pixel, output channel), where the tensor cannot be written in that form.
        Buffer<acc_t> tile(writes_out() ? 0 : schedule.tile_pixels * std::max(rows, outs));
        for (int64_t i = begin; i < end; ++i) {
          const int64_t pixel = i % schedule.tiles * schedule.tile_pixels;
          run_tile(first + i / schedule.tiles, pixel, std::min(schedule.tile_pixels, p.out_pixels() - pixel),
                   scratch.data(), columns.data(), tile.data(), out);
        }
      });
    }
  }

 private:
  bool writes_out() const { return std::is_same_v<storage_t, acc_t> && p.channels_last; }

  void run_tile(int64_t n, int64_t begin, int64_t count, void* scratch, gemm_t* columns, acc_t* tile,
                storage_t* out) {
    this->sample(n, begin, count, scratch, columns);
    // The sums of some output channels: in the tensor, or in the tile and then written.
    auto each = [&](const Matrix<storage_t>& to, int64_t rows, int64_t tile_row, auto fill) {
      if constexpr (std::is_same_v<storage_t, acc_t>)
        if (writes_out()) return fill(to.data, p.out_channels, rows);
      fill(tile, tile_row, tile_row);
      if (!p.channels_last) return k.unpack_image(tile, tile_row, to.data, p.out_pixels(), count, rows);
      for (int64_t i = 0; i < count; ++i) k.to_storage(tile + i * tile_row, to.data + i * p.out_channels, rows);
    };
    if (this->depthwise) {
      each(tile_of(p, p.channels_last, out, n, begin, count, 0), p.channels, p.channels,
           [&](acc_t* sums, int64_t, int64_t) {
             k.depthwise_tile(count, p.taps(), p.channels, columns, this->weight_acc_.data(), bias_.data(), sums);
           });
      return;
    }
    const int64_t rows = p.group_out_channels();
    for (int64_t g = 0; g < p.groups; ++g)
      each(tile_of(p, p.channels_last, out, n, begin, count, g), rows, outs,
           [&](acc_t* sums, int64_t row, int64_t written) {
             for (int64_t i = 0; i < count; ++i) std::copy_n(bias_.data() + g * outs, written, sums + i * row);
             k.matmul({count, rows, width, columns + g * this->layout.group, width, 1,
                       this->panels_.data() + g * this->group_panels_, k.panel, this->panel_size_, true, sums, row, true});
           });
  }

  Buffer<acc_t> bias_;
};

}  // namespace dynconv::deform
