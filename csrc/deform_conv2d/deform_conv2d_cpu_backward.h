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
  using Base::Base, Base::p, Base::k, Base::schedule;

  void run(const storage_t* grad_out, bool grad_out_channels_last, const DeformGradients<storage_t, acc_t>& wanted) {
    grad_out_ = grad_out;
    grad_out_channels_last_ = grad_out_channels_last;
    wanted_ = wanted;
    if (Base::own_product && !this->depthwise && wanted.wants_columns_grad()) this->make_panels(false);
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
    Buffer<gemm_t> columns, grad_columns, grad_out, grad_weight_tile;
    Buffer<acc_t> grad_out_acc, grad_weight, grad_bias, image;
    std::vector<Partial> partials;
  };

  int64_t weight_size() const { return p.out_channels * p.group_channels() * p.taps(); }

  void prepare(Worker& w) {
    if (w.columns.size()) return;
    w.scratch = Buffer<char>(this->scratch_size());
    w.columns = Buffer<gemm_t>(this->columns_size());
    if (wanted_.wants_columns_grad()) w.grad_columns = Buffer<gemm_t>(this->columns_size());
    if (!std::is_same_v<storage_t, gemm_t> && !this->depthwise) w.grad_out = Buffer<gemm_t>(schedule.tile_pixels * p.out_channels);
    if (this->depthwise) w.grad_out_acc = Buffer<acc_t>(schedule.tile_pixels * p.out_channels);
    if (wanted_.weight) {
      w.grad_weight = Buffer<acc_t>(weight_size());
      w.grad_weight.zero();
      if (!Base::own_product) w.grad_weight_tile = Buffer<gemm_t>(weight_size() / p.groups);
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
        const Matrix<const gemm_t> grad = grad_matrix(w, n, begin, count, g);
        if constexpr (Base::own_product) multiply(w, grad, count, g);
        else multiply_by_library(w, grad, count, g);
      }
    }
    if (wanted_.wants_columns_grad()) {
      auto offset = wanted_.offset, mask = wanted_.mask;
      k.scatter_tile(p, this->image(n), this->offset_, this->mask_, n, begin, count, this->column_groups,
                     w.scratch.data(), w.grad_columns.data(), grad_input, offset, mask);
    }
  }

  // grad_weight += grad * columns, grad_columns = grad^T * weight, of one group.
  void multiply(Worker& w, const Matrix<const gemm_t>& grad, int64_t count, int64_t group) {
    const int64_t rows = p.group_out_channels(), width = p.taps() * p.group_channels();
    const int64_t at = group * count * width;
    if (wanted_.weight)
      k.matmul({rows, width, count, grad.data, grad.row_stride, grad.column_stride, w.columns.data() + at, width,
                k.panel, false, w.grad_weight.data() + group * rows * width, width, true});
    if (wanted_.wants_columns_grad())
      k.matmul({count, width, rows, grad.data, grad.column_stride, grad.row_stride,
                this->panels_.data() + group * this->group_panels_, k.panel, rows * k.panel, true,
                w.grad_columns.data() + at, width, false});
  }
  void multiply_by_library(Worker& w, const Matrix<const gemm_t>& grad, int64_t count, int64_t group) {
    const auto columns = this->columns_of(static_cast<const gemm_t*>(w.columns.data()), count, group);
    if (wanted_.weight) {
      // A tile's sum is rounded once to gemm_t, as the columns were; tiles are added in acc_t.
      const int64_t width = columns.columns, size = p.group_out_channels() * width;
      gemm(Matrix<gemm_t>{w.grad_weight_tile.data(), p.group_out_channels(), width, width, 1}, grad, columns, false);
      k.add_row(w.grad_weight_tile.data(), w.grad_weight.data() + group * size, size);
    }
    if (wanted_.wants_columns_grad())
      gemm(this->columns_of(w.grad_columns.data(), count, group), grad.transposed(), this->weight_of(group), false);
  }

  // grad_out of a tile and group as gemm_t.
  Matrix<const gemm_t> grad_matrix(Worker& w, int64_t n, int64_t begin, int64_t count, int64_t group) {
    const auto tile = tile_of(p, grad_out_channels_last_, grad_out_, n, begin, count, group);
    if constexpr (std::is_same_v<storage_t, gemm_t>) {
      return tile;
    } else {
      const int64_t rows = tile.rows;
      gemm_t* copy = w.grad_out.data();
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
    const int64_t slices = (p.in_pixels() + 1023) / 1024;
    torch::stable::parallel_for(0, int64_t(images.size()) * slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto& parts = images[i / slices];
        const int64_t from = i % slices * 1024, to = std::min<int64_t>(from + 1024, p.in_pixels());
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
    Buffer<acc_t> total(weight_size());
    total.zero();
    for (Worker& w : workers)
      if (w.grad_weight.size()) k.add_acc_row(w.grad_weight.data(), total.data(), weight_size());
    const int64_t taps = p.taps(), cg = p.group_channels();
    if (this->depthwise) {
      k.unpack_image(total.data(), p.channels, wanted_.weight, taps, taps, p.channels);
      return;
    }
    for (int64_t o = 0; o < p.out_channels; ++o)
      k.unpack_image(total.data() + o * taps * cg, cg, wanted_.weight + o * taps * cg, taps, taps, cg);
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
