// SPDX-License-Identifier: BSD-3-Clause
// Forward pass of deform_conv2d on the CPU.
#pragma once

#include "deform_conv2d/deform_conv2d_cpu.h"

namespace dynconv::deform {

template <class storage_t, class acc_t, class gemm_t>
class DeformForward : public DeformCall<storage_t, acc_t, gemm_t> {
  using Base = DeformCall<storage_t, acc_t, gemm_t>;

 public:
  using Base::Base, Base::p, Base::k, Base::schedule;

  void run(const storage_t* bias, storage_t* out) {
    const bool writes_out = std::is_same_v<storage_t, acc_t> && p.channels_last;
    bias_ = Buffer<acc_t>(p.out_channels);
    bias_.zero();
    if (bias) k.to_acc(bias, bias_.data(), p.out_channels);
    if (Base::own_product && !this->depthwise) this->make_panels(true);
    for (int64_t first = 0; first < p.batch; first += schedule.chunk_images) {
      const int64_t count = std::min(schedule.chunk_images, p.batch - first);
      this->begin_chunk(first, count);
      torch::stable::parallel_for(0, count * schedule.tiles, 1, [&](int64_t begin, int64_t end) {
        Buffer<gemm_t> columns(this->columns_size());
        Buffer<char> scratch(this->scratch_size());
        // (pixel, output channel), where the tensor cannot be written in that form.
        const bool need_tile = !writes_out && (Base::own_product || this->depthwise);
        Buffer<acc_t> tile(need_tile ? schedule.tile_pixels * p.out_channels : 0);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t pixel = i % schedule.tiles * schedule.tile_pixels;
          run_tile(first + i / schedule.tiles, pixel, std::min(schedule.tile_pixels, p.out_pixels() - pixel),
                   scratch.data(), columns.data(), tile.data(), out);
        }
      });
    }
  }

 private:
  void run_tile(int64_t n, int64_t begin, int64_t count, void* scratch, gemm_t* columns, acc_t* tile,
                storage_t* out) {
    this->sample(n, begin, count, scratch, columns);
    auto whole = tile_of(p, p.channels_last, out, n, begin, count, 0);
    whole.rows = p.out_channels;
    if constexpr (!Base::own_product) {
      if (!this->depthwise) {
        fill_bias(whole);
        for (int64_t g = 0; g < p.groups; ++g)
          gemm(tile_of(p, p.channels_last, out, n, begin, count, g), this->weight_of(g),
               this->columns_of(static_cast<const gemm_t*>(columns), count, g).transposed(), true);
        return;
      }
    }
    acc_t* result = tile;
    if constexpr (std::is_same_v<storage_t, acc_t>)
      if (p.channels_last) result = whole.data;
    if (this->depthwise) {
      k.depthwise_tile(count, p.taps(), p.channels, columns, this->weight_acc_.data(), bias_.data(), result);
    } else if constexpr (Base::own_product) {
      for (int64_t i = 0; i < count; ++i)
        std::copy_n(bias_.data(), p.out_channels, result + i * p.out_channels);
      const int64_t width = p.taps() * p.group_channels(), rows = p.group_out_channels();
      for (int64_t g = 0; g < p.groups; ++g)
        k.matmul({count, rows, width, columns + g * count * width, width, 1, this->panels_.data() + g * this->group_panels_,
                  k.panel, width * k.panel, true, result + g * rows, p.out_channels, true});
    }
    if (!p.channels_last) k.unpack_image(result, p.out_channels, whole.data, p.out_pixels(), count, p.out_channels);
    else if (result == tile) k.to_storage(tile, whole.data, count * p.out_channels);
  }

  void fill_bias(const Matrix<storage_t>& tile) {
    const bool pixels_outside = tile.row_stride == 1;  // the order that writes contiguously
    for (int64_t i = 0; i < (pixels_outside ? tile.columns : tile.rows); ++i)
      for (int64_t j = 0; j < (pixels_outside ? p.out_channels : tile.columns); ++j) {
        const int64_t o = pixels_outside ? j : i, pixel = pixels_outside ? i : j;
        from_acc(bias_.data()[o], tile.data + o * tile.row_stride + pixel * tile.column_stride);
      }
  }

  Buffer<acc_t> bias_;
};

}  // namespace dynconv::deform
