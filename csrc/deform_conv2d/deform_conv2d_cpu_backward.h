// SPDX-License-Identifier: BSD-3-Clause
// Backward pass of deform_conv2d on the CPU.
#pragma once

#include "deform_conv2d/deform_conv2d_cpu.h"

#include <vector>

namespace dynconv::deform {

// Which gradients to compute and where they go; null data: not wanted. All dense; grad_input in the input's layout.
template <class storage_t, class acc_t>
struct DeformGradients {
  storage_t* input;
  ScalarWriter<acc_t> offset, mask;
  storage_t* weight;
  storage_t* bias;

  bool wants_columns_grad() const { return input || offset.data || mask.data; }
};

template <class storage_t, class acc_t, class gemm_t>
class DeformBackward : public DeformCall<storage_t, acc_t, gemm_t> {
  using Base = DeformCall<storage_t, acc_t, gemm_t>;

 public:
  using Base::Base, Base::p, Base::k, Base::schedule, Base::width, Base::outs;

  void run(const storage_t* grad_out, bool grad_out_channels_last, const DeformGradients<storage_t, acc_t>& wanted) {
    grad_out_ = grad_out;
    grad_out_channels_last_ = grad_out_channels_last;
    wanted_ = wanted;
    if (!this->depthwise && wanted.wants_columns_grad()) this->make_panels(false);
    std::vector<Worker> workers(schedule.threads);
    const int64_t most = std::max<int64_t>(1, kPartialBytes / (this->image_size() * int64_t(sizeof(acc_t))));
    for (int64_t first = 0; first < p.batch; first += schedule.chunk_images) {
      const int64_t count = std::min(schedule.chunk_images, p.batch - first);
      this->begin_chunk(first, count);
      // Each worker takes one run of tiles, so that the result depends on the number of threads only.
      const int64_t items = count * schedule.tiles;
      int64_t used = std::min(schedule.threads, items);
      if (wanted_.input && used > count) used = std::max(count, std::min(used, most));
      torch::stable::parallel_for(0, used, 1, [&](int64_t begin, int64_t end) {
        [[maybe_unused]] typename Base::Unit unit;
        for (int64_t w = begin; w < end; ++w) run_worker(workers[w], first, items * w / used, items * (w + 1) / used);
      });
      if (wanted_.input) merge_partials(workers);
    }
    if (wanted_.weight) write_weight(workers);
    if (wanted_.bias) write_bias(workers);
  }

 private:
  // The part of an image's gradient that one worker has, (H * W, C).
  struct Partial {
    int64_t n;
    Buffer<acc_t> grad_input;
  };
  struct Worker {
    Buffer<char> scratch;
    Buffer<gemm_t> columns, panels;
    Buffer<gemm_t> grad_pixels, grad_outputs;  // grad_out of a tile and group: (pixel, output), and turned over
    Buffer<acc_t> grad_columns, grad_out_acc, grad_weight, grad_bias, image;
    std::vector<Partial> partials;
  };

  // Of a worker's sums, (group, output, column) with both rounded up.
  int64_t sums_size() const { return this->depthwise ? p.taps() * p.channels : p.groups * outs * width; }

  void prepare(Worker& w) {
    if (w.columns.size()) return;
    w.scratch = Buffer<char>(this->scratch_size());
    w.columns = this->new_columns();
    if (wanted_.wants_columns_grad()) w.grad_columns = Buffer<acc_t>(this->columns_size());
    if (this->depthwise) {
      w.grad_out_acc = Buffer<acc_t>(schedule.tile_pixels * p.out_channels);
    } else if (!std::is_same_v<storage_t, gemm_t> || Base::pairs) {
      w.grad_pixels = Buffer<gemm_t>(schedule.tile_pixels * outs);
      if (Base::pairs) w.grad_pixels.zero();  // what lies behind a pixel's outputs
      if (Base::pairs && wanted_.weight) {
        w.grad_outputs = Buffer<gemm_t>(schedule.tile_pixels * outs);
        w.panels = Buffer<gemm_t>(schedule.tile_pixels * width);
      }
    }
    if (wanted_.weight) {
      w.grad_weight = Buffer<acc_t>(sums_size());
      w.grad_weight.zero();
    }
    if (wanted_.bias) {
      w.grad_bias = Buffer<acc_t>(p.out_channels);
      w.grad_bias.zero();
    }
  }

  // Tiles [begin, end) of the chunk that starts at image first.
  void run_worker(Worker& w, int64_t first, int64_t begin, int64_t end) {
    prepare(w);
    while (begin < end) {
      const int64_t n = begin / schedule.tiles, from = begin - n * schedule.tiles;
      const int64_t to = std::min(schedule.tiles, end - n * schedule.tiles);
      const bool whole = from == 0 && to == schedule.tiles;
      acc_t* grad_input = nullptr;
      if (wanted_.input) {
        if (whole) {
          if (w.image.size() == 0) w.image = Buffer<acc_t>(this->image_size());
          w.image.zero();
          grad_input = w.image.data();
        } else {
          w.partials.push_back({first + n, Buffer<acc_t>(this->image_size())});
          w.partials.back().grad_input.zero();
          grad_input = w.partials.back().grad_input.data();
        }
      }
      for (int64_t tile = from; tile < to; ++tile) run_tile(w, first + n, tile * schedule.tile_pixels, grad_input);
      if (wanted_.input && whole) write_image(first + n, grad_input, 0, p.in_pixels());
      begin += to - from;
    }
  }

  void run_tile(Worker& w, int64_t n, int64_t begin, acc_t* grad_input) {
    const int64_t count = std::min(schedule.tile_pixels, p.out_pixels() - begin);
    const auto grad_tile = tile_of(p, grad_out_channels_last_, grad_out_, n, begin, count, 0);
    if (wanted_.bias) add_bias(w, grad_tile);
    if (!wanted_.wants_columns_grad() && !wanted_.weight) return;
    if (wanted_.weight) this->sample(n, begin, count, w.scratch.data(), w.columns.data());
    if (this->depthwise) {
      acc_t* grad = w.grad_out_acc.data();
      if (grad_out_channels_last_) k.to_acc(grad_tile.data, grad, count * p.channels);
      else k.pack_grad_out(grad_tile.data, p.out_pixels(), grad, p.channels, p.channels, count);
      k.depthwise_backward_tile(count, p.taps(), p.channels, grad, this->weight_acc_.data(), w.columns.data(),
                                w.grad_columns.data(), w.grad_weight.data());
    } else {
      for (int64_t g = 0; g < p.groups; ++g) {
        const auto grad = tile_of(p, grad_out_channels_last_, grad_out_, n, begin, count, g);
        if constexpr (Base::pairs) multiply_pairs(w, grad, count, g);
        else multiply(w, grad_matrix(w, grad, count), count, g);
      }
    }
    if (wanted_.wants_columns_grad()) {
      auto offset = wanted_.offset, mask = wanted_.mask;
      k.scatter_tile(p, this->image(n), this->offset_, this->mask_, n, begin, count, this->layout,
                     w.scratch.data(), w.grad_columns.data(), grad_input, offset, mask);
    }
  }

  // grad_weight += grad * columns, grad_columns = grad^T * weight, of one group.
  void multiply(Worker& w, const Matrix<const gemm_t>& grad, int64_t count, int64_t group) {
    const int64_t rows = p.group_out_channels();
    if (wanted_.weight)
      k.matmul({rows, width, count, grad.data, grad.row_stride, grad.column_stride,
                w.columns.data() + group * this->layout.group, width, k.panel, false,
                w.grad_weight.data() + group * rows * width, width, true});
    if (wanted_.wants_columns_grad())
      k.matmul({count, width, rows, grad.data, grad.column_stride, grad.row_stride,
                this->panels_.data() + group * this->group_panels_, k.panel, this->panel_size_, true,
                w.grad_columns.data() + group * this->layout.group, width, false});
  }

  // The same by matmul_pairs, which reads rows along the depth, and panels.
  void multiply_pairs(Worker& w, const Matrix<const storage_t>& grad, int64_t count, int64_t group) {
    const int64_t rows = grad.rows, taken = p.taps() * p.group_channels();
    if (wanted_.weight) {
      const int64_t row = schedule.tile_pixels, depth = round_up(count, Base::depth_unit);
      gemm_t* left = w.grad_outputs.data();
      if (grad_out_channels_last_) k.pack_image(grad.data, p.out_channels, left, row, count, rows);
      else
        for (int64_t o = 0; o < rows; ++o) std::copy_n(grad.data + o * p.out_pixels(), count, left + o * row);
      for (int64_t o = 0; o < rows; ++o) std::fill(left + o * row + count, left + o * row + depth, gemm_t{});
      k.pack_panels(w.columns.data() + group * this->layout.group, width, 1, count, taken, w.panels.data());
      k.matmul({rows, taken, depth, left, row, 1, w.panels.data(), k.panel, depth * k.panel, true,
                w.grad_weight.data() + group * outs * width, width, true});
    }
    if (wanted_.wants_columns_grad()) {
      gemm_t* left = w.grad_pixels.data();
      if (!grad_out_channels_last_) k.pack_image(grad.data, p.out_pixels(), left, outs, rows, count);
      else
        for (int64_t i = 0; i < count; ++i) std::copy_n(grad.data + i * p.out_channels, rows, left + i * outs);
      k.matmul({count, taken, outs, left, outs, 1, this->panels_.data() + group * this->group_panels_, k.panel,
                this->panel_size_, true, w.grad_columns.data() + group * this->layout.group, width, false});
    }
  }

  // grad_out of a tile and group as gemm_t.
  Matrix<const gemm_t> grad_matrix(Worker& w, const Matrix<const storage_t>& tile, int64_t count) {
    if constexpr (std::is_same_v<storage_t, gemm_t>) {
      return tile;
    } else {
      const int64_t rows = tile.rows;
      gemm_t* copy = w.grad_pixels.data();
      if (grad_out_channels_last_) {
        for (int64_t i = 0; i < count; ++i) k.to_acc(tile.data + i * p.out_channels, copy + i * rows, rows);
        return {copy, rows, count, 1, rows};
      }
      for (int64_t o = 0; o < rows; ++o) k.to_acc(tile.data + o * p.out_pixels(), copy + o * count, count);
      return {copy, rows, count, count, 1};
    }
  }

  void add_bias(Worker& w, const Matrix<const storage_t>& tile) {
    if (grad_out_channels_last_) {
      for (int64_t i = 0; i < tile.columns; ++i)
        k.add_storage_row(tile.data + i * p.out_channels, w.grad_bias.data(), p.out_channels);
    } else {
      for (int64_t o = 0; o < p.out_channels; ++o)
        w.grad_bias.data()[o] += k.sum_row(tile.data + o * p.out_pixels(), tile.columns);
    }
  }

  // Pixels [begin, end) of an image's gradient to the tensor.
  void write_image(int64_t n, const acc_t* image, int64_t begin, int64_t end) {
    storage_t* out = wanted_.input + n * this->image_size();
    if (p.channels_last)
      k.to_storage(image + begin * p.channels, out + begin * p.channels, (end - begin) * p.channels);
    else
      k.unpack_image(image + begin * p.channels, p.channels, out + begin, p.in_pixels(), end - begin, p.channels);
  }

  void merge_partials(std::vector<Worker>& workers) {
    std::vector<std::vector<Partial*>> images;
    for (Worker& w : workers)
      for (Partial& partial : w.partials) {
        if (images.empty() || images.back().front()->n != partial.n) images.emplace_back();
        images.back().push_back(&partial);
      }
    const int64_t slices = ceil_div(p.in_pixels(), kSlicePixels);
    torch::stable::parallel_for(0, int64_t(images.size()) * slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto& parts = images[i / slices];
        const int64_t from = i % slices * kSlicePixels, to = std::min(from + kSlicePixels, p.in_pixels());
        acc_t* sum = parts[0]->grad_input.data();
        for (size_t j = 1; j < parts.size(); ++j)
          k.add_acc_row(parts[j]->grad_input.data() + from * p.channels, sum + from * p.channels,
                        (to - from) * p.channels);
        write_image(parts[0]->n, sum, from, to);
      }
    });
    for (Worker& w : workers) w.partials.clear();
  }

  void write_weight(std::vector<Worker>& workers) {
    Buffer<acc_t> total(sums_size());
    total.zero();
    for (Worker& w : workers)
      if (w.grad_weight.size()) k.add_acc_row(w.grad_weight.data(), total.data(), sums_size());
    const int64_t taps = p.taps(), cg = p.group_channels();
    if (this->depthwise) {
      k.unpack_image(total.data(), p.channels, wanted_.weight, taps, taps, p.channels);
      return;
    }
    const int64_t rows = p.group_out_channels();
    for (int64_t o = 0; o < p.out_channels; ++o)
      k.unpack_image(total.data() + (o / rows * outs + o % rows) * width, cg, wanted_.weight + o * taps * cg, taps, taps,
                     cg);
  }

  void write_bias(std::vector<Worker>& workers) {
    Buffer<acc_t> total(p.out_channels);
    total.zero();
    for (Worker& w : workers)
      if (w.grad_bias.size()) k.add_acc_row(w.grad_bias.data(), total.data(), p.out_channels);
    k.to_storage(total.data(), wanted_.bias, p.out_channels);
  }

  const storage_t* grad_out_ = nullptr;
  bool grad_out_channels_last_ = false;
  DeformGradients<storage_t, acc_t> wanted_{};
};

}  // namespace dynconv::deform
