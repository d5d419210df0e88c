// SPDX-License-Identifier: BSD-3-Clause
// CPU backend of deform_conv2d: tiles of output pixels are sampled into columns that stay in the cache, and multiplied
// with the weight by the matrix product of torch. Nothing of the size of all columns is ever allocated.
#include "common/buffer.h"
#include "common/cpu_level.h"
#include "common/dispatch.h"
#include "common/gemm.h"
#include "common/half_types.h"
#include "common/host_device.h"
#include "deform_conv2d/deform_conv2d_params.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dynconv {

// The image that the loops sample: channels fastest, and what a corner outside reads instead.
template <class storage_t>
struct DeformImage {
  const storage_t* pixels;    // (H * W, C)
  const storage_t* zero_row;  // C zeros
};

// storage_t is what the tensors hold, acc_t what is computed in, gemm_t what the matrix product multiplies.
template <class storage_t, class acc_t, class gemm_t>
struct DeformKernels {
  int64_t scratch_bytes;  // a tap, for the two tile functions
  void (*sample_tile)(const DeformConv2dParams&, DeformImage<storage_t>, ScalarReader<acc_t> offset,
                      ScalarReader<acc_t> mask, int64_t n, int64_t begin, int64_t count, int64_t column_groups,
                      void* scratch, gemm_t* columns);
  void (*scatter_tile)(const DeformConv2dParams&, DeformImage<storage_t>, ScalarReader<acc_t> offset,
                       ScalarReader<acc_t> mask, int64_t n, int64_t begin, int64_t count, int64_t column_groups,
                       void* scratch, const gemm_t* grad_columns, acc_t* grad_input, ScalarWriter<acc_t> grad_offset,
                       ScalarWriter<acc_t> grad_mask);
  void (*depthwise_tile)(int64_t count, int64_t taps, int64_t channels, const gemm_t* columns, const acc_t* weight,
                         const acc_t* bias, acc_t* out);
  void (*depthwise_backward_tile)(int64_t count, int64_t taps, int64_t channels, const acc_t* grad_out,
                                  const acc_t* weight, const gemm_t* columns, gemm_t* grad_columns,
                                  acc_t* grad_weight);
  void (*pack_image)(const storage_t*, int64_t, storage_t*, int64_t, int64_t, int64_t);
  void (*pack_weight)(const storage_t*, int64_t, gemm_t*, int64_t, int64_t, int64_t);
  void (*unpack_image)(const acc_t*, int64_t, storage_t*, int64_t, int64_t, int64_t);
  void (*pack_grad_out)(const storage_t*, int64_t, acc_t*, int64_t, int64_t, int64_t);
  void (*to_storage)(const acc_t*, storage_t*, int64_t);
  void (*to_acc)(const storage_t*, acc_t*, int64_t);
  void (*add_row)(const gemm_t*, acc_t*, int64_t);
  void (*add_acc_row)(const acc_t*, acc_t*, int64_t);
  void (*add_storage_row)(const storage_t*, acc_t*, int64_t);
  acc_t (*sum_row)(const storage_t*, int64_t);
};

}  // namespace dynconv

#define DYNCONV_KERNELS "deform_conv2d/deform_conv2d_cpu_kernels.h"
#include "common/foreach_cpu_level.h"

namespace dynconv {
namespace {

// Columns of a tile fill about this much of a core's second-level cache.
constexpr int64_t kTileBytes = 1024 * 1024;
// Channels-first images are turned over in chunks of about this size.
constexpr int64_t kChunkBytes = 16 * 1024 * 1024;
// Threads that share an image each have a gradient of it, up to this much together.
constexpr int64_t kPartialBytes = 512 * 1024 * 1024;

template <class storage_t, class acc_t, class gemm_t>
const DeformKernels<storage_t, acc_t, gemm_t>& kernels() {
  static const auto chosen = [] {
#if defined(__x86_64__)
    if (cpu_level() == CpuLevel::avx512) return avx512::deform_kernels<storage_t, acc_t, gemm_t>();
    if (cpu_level() == CpuLevel::avx2) return avx2::deform_kernels<storage_t, acc_t, gemm_t>();
#endif
    return baseline::deform_kernels<storage_t, acc_t, gemm_t>();
  }();
  return chosen;
}

// How one call is cut: chunks of images, tiles of pixels.
struct Schedule {
  int64_t threads, chunk_images, tile_pixels, tiles;

  Schedule(const DeformConv2dParams& p, int64_t storage_size, int64_t gemm_size) {
    threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    const int64_t fit = kTileBytes / std::max<int64_t>(1, p.taps() * p.channels * gemm_size);
    tile_pixels = std::clamp<int64_t>(fit / 16 * 16, 32, 512);
    // Small maps: enough tiles for every thread, all of about the same size.
    const int64_t wanted = std::max<int64_t>((p.out_pixels() + tile_pixels - 1) / tile_pixels,
                                             std::min((threads + p.batch - 1) / std::max<int64_t>(1, p.batch),
                                                      (p.out_pixels() + 15) / 16));
    tile_pixels = (p.out_pixels() + wanted - 1) / wanted;
    tiles = (p.out_pixels() + tile_pixels - 1) / tile_pixels;
    const int64_t image_bytes = p.in_pixels() * p.channels * storage_size;
    chunk_images = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, image_bytes));
    if (chunk_images > threads) chunk_images = chunk_images / threads * threads;
    chunk_images = std::min(chunk_images, p.batch);
  }
};

// Whether the layer is depthwise with one output a channel: its product is done in the sampling's own layout.
bool is_depthwise(const DeformConv2dParams& p) { return p.groups == p.channels && p.out_channels == p.channels; }

template <class storage_t, class acc_t, class gemm_t>
class DeformCall {
 public:
  // Whether the product may read and write the tensors themselves.
  static constexpr bool direct = std::is_same_v<storage_t, gemm_t>;
  using Kernels = DeformKernels<storage_t, acc_t, gemm_t>;

  DeformCall(const DeformConv2dParams& params, const storage_t* input, ScalarReader<acc_t> offset,
             ScalarReader<acc_t> mask, const storage_t* weight)
      : p(params),
        k(kernels<storage_t, acc_t, gemm_t>()),
        schedule(params, sizeof(storage_t), sizeof(gemm_t)),
        depthwise(is_depthwise(params)),
        column_groups(depthwise ? 1 : params.groups),
        input_(input),
        offset_(offset),
        mask_(mask),
        zero_row_(params.channels) {
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
  int64_t columns_size() const { return schedule.tile_pixels * p.taps() * p.channels; }

  // Makes images [first, first + count) readable through image().
  void begin_chunk(int64_t first, int64_t count) {
    chunk_first_ = first;
    if (p.channels_last) return;
    // Slices of pixels, so that one large image keeps every thread busy as well.
    const int64_t slices = (p.in_pixels() + 1023) / 1024;
    torch::stable::parallel_for(0, count * slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / slices, from = i % slices * 1024, pixels = std::min<int64_t>(1024, p.in_pixels() - from);
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
    k.sample_tile(p, image(n), offset_, mask_, n, begin, count, column_groups, scratch, columns);
  }

  Matrix<const gemm_t> weight_of(int64_t group) const {
    const int64_t rows = p.group_out_channels(), columns = p.taps() * p.group_channels();
    return {weight_.data() + group * rows * columns, rows, columns, columns, 1};
  }

  template <class T>
  Matrix<T> columns_of(T* columns, int64_t count, int64_t group) const {
    const int64_t width = p.taps() * p.group_channels();
    return {columns + group * count * width, count, width, width, 1};
  }

  const DeformConv2dParams& p;
  const Kernels& k;
  const Schedule schedule;
  const bool depthwise;
  const int64_t column_groups;

 protected:
  const storage_t* input_;
  ScalarReader<acc_t> offset_, mask_;
  Buffer<storage_t> zero_row_, packed_;
  Buffer<gemm_t> weight_;
  Buffer<acc_t> weight_acc_;
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

// ---------------------------------------------------------------------------------------------------------- forward

template <class storage_t, class acc_t, class gemm_t>
class DeformForward : public DeformCall<storage_t, acc_t, gemm_t> {
  using Base = DeformCall<storage_t, acc_t, gemm_t>;

 public:
  using Base::Base, Base::p, Base::k, Base::schedule;

  void run(const storage_t* bias, storage_t* out) {
    bias_ = Buffer<acc_t>(p.out_channels);
    bias_.zero();
    if (bias) k.to_acc(bias, bias_.data(), p.out_channels);
    for (int64_t first = 0; first < p.batch; first += schedule.chunk_images) {
      const int64_t count = std::min(schedule.chunk_images, p.batch - first);
      this->begin_chunk(first, count);
      torch::stable::parallel_for(0, count * schedule.tiles, 1, [&](int64_t begin, int64_t end) {
        Buffer<gemm_t> columns(this->columns_size());
        Buffer<char> scratch(this->scratch_size());
        // What the product writes where the tensor is of another type, or the layer depthwise.
        Buffer<acc_t> tile(Base::direct && !this->depthwise ? 0 : schedule.tile_pixels * p.out_channels);
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
    const auto whole = tile_of(p, p.channels_last, out, n, begin, count, 0);
    if (this->depthwise) {
      k.depthwise_tile(count, p.taps(), p.channels, columns, this->weight_acc_.data(), bias_.data(), tile);
      if (p.channels_last) k.to_storage(tile, whole.data, count * p.channels);
      else k.unpack_image(tile, p.channels, whole.data, p.out_pixels(), count, p.channels);
      return;
    }
    if constexpr (Base::direct) {
      fill_bias(out, n, begin, count, whole.row_stride, whole.column_stride);
      for (int64_t g = 0; g < p.groups; ++g)
        gemm(tile_of(p, p.channels_last, out, n, begin, count, g), this->weight_of(g),
             this->columns_of(static_cast<const gemm_t*>(columns), count, g).transposed(), true);
    } else {
      // The tile is dense, in the layout of out.
      const int64_t row = p.channels_last ? 1 : count, column = p.channels_last ? p.out_channels : 1;
      fill(tile, count, row, column);
      const int64_t rows = p.group_out_channels();
      for (int64_t g = 0; g < p.groups; ++g)
        gemm(Matrix<gemm_t>{tile + g * rows * row, rows, count, row, column}, this->weight_of(g),
             this->columns_of(static_cast<const gemm_t*>(columns), count, g).transposed(), true);
      if (p.channels_last) k.to_storage(tile, whole.data, count * p.out_channels);
      else
        for (int64_t o = 0; o < p.out_channels; ++o)
          k.to_storage(tile + o * count, whole.data + o * p.out_pixels(), count);
    }
  }

  template <class T>
  void fill(T* tile, int64_t count, int64_t row, int64_t column) {
    if (row == 1) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t o = 0; o < p.out_channels; ++o) from_acc(bias_.data()[o], tile + i * column + o);
    } else {
      for (int64_t o = 0; o < p.out_channels; ++o)
        for (int64_t i = 0; i < count; ++i) from_acc(bias_.data()[o], tile + o * row + i);
    }
  }
  void fill_bias(storage_t* out, int64_t n, int64_t begin, int64_t count, int64_t row, int64_t column) {
    fill(tile_of(p, p.channels_last, out, n, begin, count, 0).data, count, row, column);
  }

  Buffer<acc_t> bias_;
};

// --------------------------------------------------------------------------------------------------------- backward

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
    if (!Base::direct && !this->depthwise) w.grad_out = Buffer<gemm_t>(schedule.tile_pixels * p.out_channels);
    if (this->depthwise) w.grad_out_acc = Buffer<acc_t>(schedule.tile_pixels * p.out_channels);
    if (wanted_.weight) {
      w.grad_weight = Buffer<acc_t>(weight_size());
      w.grad_weight.zero();
      if (!std::is_same_v<gemm_t, acc_t>) w.grad_weight_tile = Buffer<gemm_t>(weight_size() / p.groups);
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
        const auto columns = this->columns_of(static_cast<const gemm_t*>(w.columns.data()), count, g);
        if (wanted_.weight) {
          const int64_t rows = columns.columns, size = p.group_out_channels() * rows;
          acc_t* total = w.grad_weight.data() + g * size;
          if constexpr (std::is_same_v<gemm_t, acc_t>) {
            gemm(Matrix<gemm_t>{total, p.group_out_channels(), rows, rows, 1}, grad, columns, true);
          } else {
            // A tile's sum is rounded once to gemm_t, as the columns were; tiles are added in acc_t.
            gemm(Matrix<gemm_t>{w.grad_weight_tile.data(), p.group_out_channels(), rows, rows, 1}, grad, columns,
                 false);
            k.add_row(w.grad_weight_tile.data(), total, size);
          }
        }
        if (wanted_.wants_columns_grad())
          gemm(this->columns_of(w.grad_columns.data(), count, g), grad.transposed(), this->weight_of(g), false);
      }
    }
    if (wanted_.wants_columns_grad()) {
      auto offset = wanted_.offset, mask = wanted_.mask;
      k.scatter_tile(p, this->image(n), this->offset_, this->mask_, n, begin, count, this->column_groups,
                     w.scratch.data(), w.grad_columns.data(), grad_input, offset, mask);
    }
  }

  // grad_out of a tile and group as gemm_t.
  Matrix<const gemm_t> grad_matrix(Worker& w, int64_t n, int64_t begin, int64_t count, int64_t group) {
    const auto tile = tile_of(p, grad_out_channels_last_, grad_out_, n, begin, count, group);
    if constexpr (Base::direct) {
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

// --------------------------------------------------------------------------------------------------------- operators

template <class acc_t>
ScalarReader<acc_t> reader(const std::optional<Tensor>& tensor) {
  if (!tensor) return {nullptr, StorageType::float32};
  return {tensor->const_data_ptr(), storage_type_of(*tensor)};
}
template <class acc_t>
ScalarWriter<acc_t> writer(Tensor& tensor) {
  return {tensor.numel() ? tensor.mutable_data_ptr() : nullptr, storage_type_of(tensor)};
}

Tensor deform_conv2d_cpu(const Tensor& input, const Tensor& offset, const Tensor& weight,
                         const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                         const std::optional<Tensor>& mask) {
  const DeformConv2dParams p = make_params(input, offset, weight, bias, stride, padding, dilation, mask);
  Tensor out = new_tensor(input, {p.batch, p.out_channels, p.out_height, p.out_width}, p.channels_last);
  if (p.batch == 0) return out;
  const Tensor x = dense(input, p.channels_last), w = torch::stable::contiguous(weight);
  const std::optional<Tensor> b = dense(bias);
  dispatch_types(input.scalar_type(), [&](auto storage, auto acc, auto product) {
    using storage_t = typename decltype(storage)::type;
    using acc_t = typename decltype(acc)::type;
    using gemm_t = typename decltype(product)::type;
    DeformForward<storage_t, acc_t, gemm_t> call(p, const_data<storage_t>(x),
                                                 reader<acc_t>(offset), reader<acc_t>(mask),
                                                 const_data<storage_t>(w));
    call.run(const_data<storage_t>(b), static_cast<storage_t*>(out.mutable_data_ptr()));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward_cpu(
    const Tensor& grad_out, const Tensor& input, const Tensor& offset, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
    const std::optional<Tensor>& mask, const std::vector<bool>& output_mask) {
  const DeformConv2dParams p = make_params(input, offset, weight, std::nullopt, stride, padding, dilation, mask);
  check_dim("grad_out", grad_out, 4, "(N, O, Ho, Wo)");
  check_same_dtype("grad_out", grad_out, input);
  check_same_device("grad_out", grad_out, input);
  check_equal("grad_out.shape[0]", grad_out.size(0), "input.shape[0]", p.batch);
  check_equal("grad_out.shape[1]", grad_out.size(1), "weight.shape[0]", p.out_channels);
  check_equal("grad_out.shape[2]", grad_out.size(2), "output height", p.out_height);
  check_equal("grad_out.shape[3]", grad_out.size(3), "output width", p.out_width);
  if (output_mask.size() != 5) fail("output_mask: got ", output_mask.size(), " values, expected 5");
  const int64_t taps = p.taps();
  Tensor grad_input = new_gradient(output_mask[0], input, {p.batch, p.channels, p.height, p.width}, p.channels_last);
  Tensor grad_offset =
      new_gradient(output_mask[1], offset, {p.batch, 2 * p.offset_groups * taps, p.out_height, p.out_width});
  Tensor grad_weight =
      new_gradient(output_mask[2], weight, {p.out_channels, p.group_channels(), p.kernel_height, p.kernel_width});
  Tensor grad_bias = new_gradient(output_mask[3], weight, {p.out_channels});
  Tensor grad_mask = new_gradient(output_mask[4] && mask, mask ? *mask : offset,
                            {p.batch, p.offset_groups * taps, p.out_height, p.out_width});
  if (p.batch == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_input, grad_offset, grad_weight, grad_bias, grad_mask};
  }
  const Tensor x = dense(input, p.channels_last), w = torch::stable::contiguous(weight);
  const bool grad_channels_last = is_channels_last(grad_out);
  const Tensor g = dense(grad_out, grad_channels_last);
  dispatch_types(input.scalar_type(), [&](auto storage, auto acc, auto product) {
    using storage_t = typename decltype(storage)::type;
    using acc_t = typename decltype(acc)::type;
    using gemm_t = typename decltype(product)::type;
    DeformBackward<storage_t, acc_t, gemm_t> call(p, const_data<storage_t>(x),
                                                  reader<acc_t>(offset), reader<acc_t>(mask),
                                                  const_data<storage_t>(w));
    DeformGradients<storage_t, acc_t> gradients{mutable_data<storage_t>(grad_input), writer<acc_t>(grad_offset),
                                                writer<acc_t>(grad_mask), mutable_data<storage_t>(grad_weight), mutable_data<storage_t>(grad_bias)};
    call.run(const_data<storage_t>(g), grad_channels_last, gradients);
  });
  return {grad_input, grad_offset, grad_weight, grad_bias, grad_mask};
}

}  // namespace
}  // namespace dynconv

STABLE_TORCH_LIBRARY_IMPL(dynconv_ext, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&dynconv::deform_conv2d_cpu));
  m.impl("deform_conv2d_backward", TORCH_BOX(&dynconv::deform_conv2d_backward_cpu));
}
