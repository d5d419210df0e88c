// SPDX-License-Identifier: BSD-3-Clause
// What the CPU's ways of computing dynamic_conv2d share: the kernels chosen for this CPU, the call's memory, the mixing
// weights and their gradient.
#pragma once

#include "common/buffer.h"
#include "common/cpu_level.h"
#include "common/dispatch.h"
#include "common/half_types.h"
#include "common/matmul_bfloat16.h"
#include "common/rounding.h"
#include "dynamic_conv2d/dynamic_conv2d_math.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dynconv {

// A block of the bank: rows of count weights, of each of the kernels.
template <class storage_t>
struct BankBlock {
  const storage_t* data;
  int64_t num_kernels, kernel_stride;
  int64_t rows, row_stride, count;
};

// Where sums over samples for such a block go, in acc_t.
template <class acc_t>
struct BankSums {
  acc_t* data;
  int64_t kernel_stride, row_stride;
};

// A run of an image's channels, and how its padded copy lies: (channel, row, column).
template <class storage_t>
struct ImageChunk {
  const storage_t* data;
  int64_t channels, height, width, channel_stride, pixel_stride;
  int64_t padded_channel, padded_row, padding_width;
};

// Columns of some pixels: row (channel, tap) and pixel lie at row_offset + pixel_offset of a padded copy. Both tables go
// on to a whole panel; what lies there is readable and not used.
struct ColumnPlan {
  const int32_t* row_offset;
  const int32_t* pixel_offset;
  int64_t rows, pixels;
  int64_t panel;        // pixels of a panel
  int64_t padded_rows;  // rows of a panel with those that are zero
};

// Loops over the bank. storage_t is what the tensors hold, acc_t what is computed in, product_t what torch's convolution
// multiplies.
template <class storage_t, class acc_t, class product_t>
struct DynamicKernels {
  int64_t lanes;
  void (*mix)(const BankBlock<storage_t>&, const acc_t* a, int64_t samples, product_t* out, int64_t out_stride,
              int64_t out_row);
  void (*unmix)(const BankBlock<storage_t>&, const product_t* grads, int64_t grad_stride, int64_t grad_row,
                const acc_t* a, int64_t samples, BankSums<acc_t> sums, bool accumulate, acc_t* dots);
  void (*add_lanes)(acc_t* vectors, int64_t count, acc_t* out);
  void (*to_product)(const storage_t*, product_t*, int64_t);
  void (*from_product)(const product_t*, storage_t*, int64_t);
  void (*from_acc)(const acc_t*, storage_t*, int64_t);
  void (*add_row)(const storage_t*, acc_t*, int64_t);
  acc_t (*sum_row)(const storage_t*, int64_t);
};

// Loops over tiles. tile_t is what their product multiplies: acc_t, or bfloat16 in matmul_pairs' layouts.
template <class storage_t, class acc_t, class tile_t>
struct DynamicTileKernels {
  int64_t lanes;
  void (*mix)(const BankBlock<storage_t>&, const acc_t* a, int64_t samples, tile_t* out, int64_t out_stride,
              int64_t out_row);
  void (*unmix)(const BankBlock<storage_t>&, const acc_t* grads, int64_t grad_stride, int64_t grad_row, const acc_t* a,
                int64_t samples, BankSums<acc_t> sums, bool accumulate, acc_t* dots);
  void (*add_lanes)(acc_t* vectors, int64_t count, acc_t* out);
  void (*matmul)(const Matmul<tile_t, acc_t>&);
  void (*pack_rows)(const ImageChunk<storage_t>&, int64_t begin, int64_t end, acc_t* padded);
  void (*unpack_rows)(const acc_t* padded, int64_t padding_height, const ImageChunk<storage_t>&);
  void (*make_columns)(const acc_t* padded, const ColumnPlan&, tile_t* columns);
  void (*make_transposed_columns)(const acc_t* padded, const ColumnPlan&, tile_t* columns);
  void (*add_columns)(const acc_t* columns, const ColumnPlan&, acc_t* padded);
  void (*make_panels)(const storage_t* from, int64_t row_stride, int64_t pixel_stride, int64_t rows, int64_t pixels,
                      int64_t panel, tile_t* panels);
  void (*write_rows)(const acc_t* from, int64_t from_row, storage_t* to, int64_t to_row, int64_t to_column,
                     int64_t rows, int64_t columns);
  void (*from_acc)(const acc_t*, storage_t*, int64_t);
  // For pairs only.
  void (*make_pair_panels)(const storage_t* from, int64_t row_stride, int64_t pixel_stride, int64_t rows,
                           int64_t padded_rows, int64_t pixels, tile_t* panels) = nullptr;
  void (*turn_over)(const storage_t* from, int64_t row_stride, int64_t outs, int64_t count, tile_t* turned) = nullptr;
};

// Depthwise: channels stand in the lanes of vectors (dynamic_conv2d_cpu_depthwise.h).

struct DepthwiseGeometry {
  int64_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width;
};

// A block of an image's channels.
template <class storage_t>
struct DepthwiseImage {
  const storage_t* data;
  int64_t channels, height, width, channel_stride, pixel_stride;
};

// Planes are (rows, columns) vectors, kernels and their gradients (taps) vectors, banks (K, taps) vectors.
template <class storage_t, class acc_t>
struct DepthwiseKernels {
  int64_t lanes;
  void (*load)(const DepthwiseImage<storage_t>&, acc_t* plane, int64_t columns, int64_t top, int64_t left);
  void (*store)(const acc_t* plane, int64_t columns, int64_t top, int64_t left, const DepthwiseImage<storage_t>&,
                storage_t* to);
  void (*convolve)(const DepthwiseGeometry&, const acc_t* plane, int64_t columns, const acc_t* kernel, const acc_t* bias,
                   const DepthwiseImage<storage_t>& out_shape, acc_t* scratch, storage_t* out);
  void (*scatter)(const DepthwiseGeometry&, const acc_t* grad_out, int64_t height, int64_t width, const acc_t* kernel,
                  acc_t* grad_plane, int64_t columns);
  void (*correlate)(const DepthwiseGeometry&, const acc_t* plane, int64_t columns, const acc_t* grad_out, int64_t height,
                    int64_t width, acc_t* grads);
  void (*mix)(const acc_t* bank, const acc_t* a, int64_t kernels, int64_t taps, acc_t* mixed);
  void (*unmix)(const acc_t* bank, const acc_t* a, const acc_t* grads, int64_t kernels, int64_t taps, acc_t* sums,
                acc_t* dots);
};

}  // namespace dynconv

#define DYNCONV_KERNELS "dynamic_conv2d/dynamic_conv2d_cpu_kernels.h"
#include "common/foreach_cpu_level.h"

namespace dynconv {

template <class storage_t, class acc_t, class product_t>
const DynamicKernels<storage_t, acc_t, product_t>& dynamic_kernels() {
  static const auto chosen = [] {
#if defined(__x86_64__)
    if (cpu_level() == CpuLevel::avx512) return avx512::dynamic_kernels<storage_t, acc_t, product_t>();
    if (cpu_level() == CpuLevel::avx2) return avx2::dynamic_kernels<storage_t, acc_t, product_t>();
#endif
    return baseline::dynamic_kernels<storage_t, acc_t, product_t>();
  }();
  return chosen;
}

template <class storage_t, class acc_t, class tile_t>
const DynamicTileKernels<storage_t, acc_t, tile_t>& dynamic_tile_kernels() {
  static const auto chosen = [] {
#if defined(__x86_64__)
    if constexpr (!std::is_same_v<tile_t, acc_t>) {
      return avx512_bf16::dynamic_tile_kernels<storage_t, acc_t, tile_t>();
    } else {
      if (cpu_level() == CpuLevel::avx512) return avx512::dynamic_tile_kernels<storage_t, acc_t, tile_t>();
      if (cpu_level() == CpuLevel::avx2) return avx2::dynamic_tile_kernels<storage_t, acc_t, tile_t>();
      return baseline::dynamic_tile_kernels<storage_t, acc_t, tile_t>();
    }
#else
    return baseline::dynamic_tile_kernels<storage_t, acc_t, tile_t>();
#endif
  }();
  return chosen;
}

// Elements of the bank that a pass over it handles at once: their K kernels and gradients stay in the cache.
constexpr int64_t kBankBlock = 2048;

// The tensors of a call as memory. All dense: input and grad_out in their own layout, the rest contiguous.
template <class storage_t>
struct DynamicTensors {
  const storage_t* input;
  const storage_t* weight;
  const storage_t* bias;      // or null
  const storage_t* grad_out;  // null in the forward pass
  bool grad_out_channels_last;
};

// Where the backward's results go; null: not wanted.
template <class storage_t, class acc_t>
struct DynamicGradients {
  storage_t* input;
  storage_t* weight;
  storage_t* bias;
  acc_t* mix;  // (N, K), of the mixing weights; starts at zero
};

// (N, K) mixing weights.
template <class acc_t>
Buffer<acc_t> mixing_weights_of(const KernelBankParams& p, ScalarReader<acc_t> attention) {
  Buffer<acc_t> mix(p.batch * p.num_kernels);
  for (int64_t i = 0; i < p.batch * p.num_kernels; ++i) mix.data()[i] = attention[i];
  for (int64_t n = 0; n < p.batch; ++n) mixing_weights(p, mix.data() + n * p.num_kernels);
  return mix;
}

template <class acc_t>
void write_grad_attention(const KernelBankParams& p, const acc_t* mix, const acc_t* grad_mix, ScalarWriter<acc_t> out) {
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t k = 0; k < p.num_kernels; ++k)
      out.write(n * p.num_kernels + k, grad_attention(p, mix + n * p.num_kernels, grad_mix + n * p.num_kernels, k));
}

// out[o] = sum_k a[k] bias[k][o] of one sample.
template <class storage_t, class acc_t, class out_t>
void mix_bias(const KernelBankParams& p, const storage_t* bias, const acc_t* a, out_t* out) {
  for (int64_t o = 0; o < p.out_channels; ++o) {
    acc_t sum = 0;
    for (int64_t k = 0; k < p.num_kernels; ++k) sum += a[k] * to_acc(bias[k * p.out_channels + o]);
    convert(sum, out + o);
  }
}

// From grad_biases (N, O), the gradients of the mixed biases: adds to grad_mix, writes grad_bias; each may be null.
template <class storage_t, class acc_t, class grad_t>
void unmix_bias(const KernelBankParams& p, const storage_t* bias, const acc_t* mix, const grad_t* grad_biases,
                acc_t* grad_mix, storage_t* grad_bias) {
  for (int64_t k = 0; k < p.num_kernels; ++k)
    for (int64_t o = 0; grad_bias && o < p.out_channels; ++o) {
      acc_t sum = 0;
      for (int64_t n = 0; n < p.batch; ++n) sum += mix[n * p.num_kernels + k] * to_acc(grad_biases[n * p.out_channels + o]);
      from_acc(sum, grad_bias + k * p.out_channels + o);
    }
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t k = 0; grad_mix && k < p.num_kernels; ++k) {
      acc_t sum = 0;
      for (int64_t o = 0; o < p.out_channels; ++o)
        sum += to_acc(bias[k * p.out_channels + o]) * to_acc(grad_biases[n * p.out_channels + o]);
      grad_mix[n * p.num_kernels + k] += sum;
    }
}

// The gradient of the bank, summed over samples in acc_t: in the tensor itself, or beside it where that is narrower.
template <class storage_t, class acc_t>
class GradBank {
 public:
  // out may be null: not wanted.
  GradBank(storage_t* out, int64_t size) : out_(out), size_(size) {
    if (out == nullptr) return;
    if constexpr (std::is_same_v<storage_t, acc_t>) {
      sums_ = out;
    } else {
      buffer_ = Buffer<acc_t>(size);
      sums_ = buffer_.data();
    }
  }
  acc_t* sums() const { return sums_; }

  // Rounds elements [begin, end) of the sums to the tensor.
  void finish(void (*from_acc)(const acc_t*, storage_t*, int64_t), int64_t begin, int64_t end) const {
    if constexpr (!std::is_same_v<storage_t, acc_t>)
      if (out_) from_acc(sums_ + begin, out_ + begin, end - begin);
  }

 private:
  storage_t* out_;
  int64_t size_;
  acc_t* sums_ = nullptr;
  Buffer<acc_t> buffer_;
};

// Sums of products with the bank that blocks of it add to the mixing weights' gradient: each block has its own, so that
// their order does not depend on which thread was faster.
template <class acc_t>
class BlockDots {
 public:
  BlockDots(bool wanted, int64_t blocks, int64_t size) : blocks_(blocks), size_(size) {
    if (wanted) dots_ = Buffer<acc_t>(blocks * size);
    dots_.zero();
  }
  acc_t* of(int64_t block) const { return dots_.data() ? dots_.data() + block * size_ : nullptr; }

  // Adds all blocks' first count sums to out and starts again.
  void add_to(acc_t* out, int64_t count) {
    if (!dots_.data()) return;
    for (int64_t b = 0; b < blocks_; ++b)
      for (int64_t i = 0; i < count; ++i) out[i] += dots_.data()[b * size_ + i];
    dots_.zero();
  }

 private:
  int64_t blocks_, size_;
  Buffer<acc_t> dots_;
};

}  // namespace dynconv
