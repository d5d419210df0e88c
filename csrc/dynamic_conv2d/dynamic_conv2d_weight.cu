// SPDX-License-Identifier: BSD-3-Clause
// Gradients of dynamic_conv2d with respect to the bank of kernels and the mixing weights.
//
// A block owns a tile of outputs x one step of the depth (columns: channels of a tap, or of some taps), and goes through
// samples. A sample's gradient G of the mixed kernel's tile stays in registers: the product of output gradients and source
// pixels; when it is complete, each kernel of the bank gets mix[k] G, and the mixing weight k gets <weight[k], G>. Neither
// G nor the mixed kernels are ever in global memory. Where tiles are too few for the device, samples (or parts of a
// sample's pixels) are shared out, and the shares' sums added by a second kernel, in order.
#include "common/cuda/launch.h"
#include "dynamic_conv2d/dynamic_conv2d_cuda_weight.h"

namespace dynconv {
namespace dynamic_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPixels = 64;   // that a block multiplies at a time
constexpr int kKernels = 4;   // of the bank, that a block has

struct WeightArguments {
  Gather gather;
  Depth depth;
  const void* source;
  ImageStrides source_stride, grad_out_stride;
  const void* grad_out;
  const void* weight;  // (K, O, C/G, kH, kW)
  const void* mix;     // (N, K) acc
  void* sums;          // (shares, tiles, kernels of the tile, kOutputs, kRow) acc; null: not wanted
  void* dots;          // (parts, N, K) acc, a part for each tile of outputs and columns and part of a sample; null: not wanted
  int num_kernels, outputs, groups, batch;  // outputs of a group
  int output_tiles, kernel_tiles;
  int samples_of_share;  // or, where samples are cut, 1
  int parts_of_sample, pixels_of_part;
  int grad_out_vectors;
};

template <class T>
struct WeightShared {
  static constexpr int kWarpM = 16, kWarpN = T::kRow < 32 ? T::kRow : 32;
  static constexpr int kWarpsN = T::kRow / kWarpN, kWarpsM = kWarps / kWarpsN;
  static constexpr int kOutputs = kWarpM * kWarpsM;
  static constexpr int kOutputColumns = kOutputs / T::kRow;  // tiles side by side
  static constexpr int kTile = kPixels * kRowBytes;
  static constexpr int kOperands = (kOutputColumns + 1) * kTile;  // output gradients, then source pixels
  static constexpr int kDots = 2 * kWarps * kKernels * int(sizeof(typename T::acc_t));
  static constexpr int kBytes = 2 * kOperands + kDots;
};

// The sums of `value[k]` over the warp's lanes: lane 8 k receives that of k.
template <class acc_t>
DYNCONV_DEVICE acc_t sum_of_four(const acc_t (&value)[4]) {
  const int lane = int(threadIdx.x & 31);
  const bool high = lane & 16, odd = lane & 8;
  // Each half of the warp goes on with two of the numbers, each quarter with one.
  acc_t two[2];
  DYNCONV_UNROLL
  for (int i = 0; i < 2; ++i) {
    const acc_t kept = high ? value[2 + i] : value[i], given = high ? value[i] : value[2 + i];
    two[i] = kept + __shfl_xor_sync(0xffffffffu, given, 16);
  }
  acc_t sum = (odd ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, odd ? two[0] : two[1], 8);
  DYNCONV_UNROLL
  for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

template <class T, bool vectors>
__global__ void __launch_bounds__(kThreads, 1) weight_kernel(const WeightArguments a) {
  using storage_t = typename T::storage_t;
  using acc_t = typename T::acc_t;
  using Product = dynconv::Product<tile_t<T>, true>;
  using Shared = WeightShared<T>;
  using Sums = typename Product::template Sums<Shared::kWarpM, Shared::kWarpN>;
  constexpr int V = T::kChunk;

  unsigned char* const shared = dynamic_shared();
  auto* const warp_dots = reinterpret_cast<acc_t*>(shared + 2 * Shared::kOperands);  // (2, warps, kKernels)
  const int thread = int(threadIdx.x), warp = thread / 32;
  int64_t block = blockIdx.x;
  auto digit = [&](int64_t base) {
    const int64_t d = block % base;
    block /= base;
    return int(d);
  };
  const int kernel_tile = digit(a.kernel_tiles);
  const int output_tile = digit(a.output_tiles);
  const int step_number = digit(a.depth.count());
  const int g = digit(a.groups);
  const int share = int(block);
  const int first_output = output_tile * Shared::kOutputs, first_kernel = kernel_tile * kKernels;
  const DepthStep step(a.depth, step_number);
  const int columns = step.columns();
  // Samples and pixels of this share.
  const int part = share % a.parts_of_sample;
  const int begin_sample = share / a.parts_of_sample * a.samples_of_share;
  const int end_sample = begin_sample + a.samples_of_share < a.batch ? begin_sample + a.samples_of_share : a.batch;
  const int pixels = a.gather.y.size * a.gather.x.size;
  const int begin_pixel = part * a.pixels_of_part;
  const int end_pixel = begin_pixel + a.pixels_of_part < pixels ? begin_pixel + a.pixels_of_part : pixels;

  // The lane's weights of each kernel, and their gradients; columns that don't exist have neither.
  const int warp_m = warp % Shared::kWarpsM * Shared::kWarpM, warp_n = warp / Shared::kWarpsM * Shared::kWarpN;
  Sums weights[kKernels], grads[kKernels];
  if (a.dots != nullptr) {
    const auto* const weight = static_cast<const storage_t*>(a.weight);
    DYNCONV_UNROLL
    for (int k = 0; k < kKernels; ++k) {
      Product::for_each(weights[k], [&](int m, int n, acc_t& value) {
        const int o = first_output + warp_m + m, column = warp_n + n;
        if (first_kernel + k >= a.num_kernels || o >= a.outputs || column >= columns) return;
        const int t = column / step.channels, c = column - t * step.channels;
        const int64_t out_channel = (int64_t(first_kernel + k) * a.groups + g) * a.outputs + o;
        value = to_acc(weight[(out_channel * a.depth.channels + step.first_channel + c) * a.depth.taps + step.first_tap + t]);
      });
    }
  }

  // -------------------------------------------------------------------------------------------------------- loading
  const auto* const source = static_cast<const storage_t*>(a.source) + int64_t(g) * a.depth.channels * a.source_stride.channel;
  const auto* const grad_out = static_cast<const storage_t*>(a.grad_out) + int64_t(g) * a.outputs * a.grad_out_stride.channel;
  auto source_pixel = [&](int n, int pixel, int tap) -> const storage_t* {
    const int y = pixel / a.gather.x.size, x = pixel - y * a.gather.x.size;
    const int i = tap / a.gather.x.taps, j = tap - i * a.gather.x.taps;
    const int source_y = a.gather.y.base(y, false) + i * a.gather.y.dilation;
    const int source_x = a.gather.x.base(x, false) + j * a.gather.x.dilation;
    if (unsigned(source_y) >= unsigned(a.gather.y.source_size) || unsigned(source_x) >= unsigned(a.gather.x.source_size))
      return nullptr;
    return source + n * a.source_stride.batch + source_y * a.source_stride.row + source_x * a.source_stride.pixel;
  };
  auto store = [&](const storage_t (&numbers)[V], void* to) {
    uint4 bits;
    __builtin_memcpy(&bits, numbers, 16);
    *static_cast<uint4*>(to) = bits;
  };
  // kPixels pixels of sample n from `first` on; rows up to a whole slice are written.
  auto load = [&](int n, int first, unsigned char* to) {
    const int count = end_pixel - first < kPixels ? end_pixel - first : kPixels;
    const int rows = (count + Product::kDepth - 1) / Product::kDepth * Product::kDepth;
    DYNCONV_NO_UNROLL
    for (int i = thread; i < Shared::kOutputColumns * kPixels * kRowChunks; i += kThreads) {
      const int tile = i / (kPixels * kRowChunks), item = i % (kPixels * kRowChunks);
      const int row = a.grad_out_vectors ? item / kRowChunks : item % kPixels;
      const int chunk = a.grad_out_vectors ? item % kRowChunks : item / kPixels;
      if (row >= rows) continue;
      const int o = first_output + tile * T::kRow + chunk * V;
      const storage_t* const from = grad_out + n * a.grad_out_stride.batch + (first + row) * a.grad_out_stride.pixel +
                                    o * a.grad_out_stride.channel;
      unsigned char* const at = to + tile * Shared::kTile + chunk_offset(row, chunk);
      if (a.grad_out_vectors) {
        const bool exists = row < count && o < a.outputs;
        copy_async_16_cached(at, exists ? from : grad_out, exists);
      } else {
        storage_t numbers[V];
        DYNCONV_UNROLL
        for (int e = 0; e < V; ++e)
          numbers[e] = row < count && o + e < a.outputs ? from[e * a.grad_out_stride.channel] : storage_t{};
        store(numbers, at);
      }
    }
    to += Shared::kOutputColumns * Shared::kTile;
    DYNCONV_NO_UNROLL
    for (int item = thread; item < kPixels * kRowChunks; item += kThreads) {
      const int row = vectors ? item / kRowChunks : item % kPixels, chunk = vectors ? item % kRowChunks : item / kPixels;
      if (row >= rows) continue;
      int c = chunk * V, t = 0;
      if (step.taps > 1) t = c / step.channels, c -= t * step.channels;
      const storage_t* pixel =
          row < count && chunk * V < columns ? source_pixel(n, first + row, step.first_tap + t) : nullptr;
      unsigned char* const at = to + chunk_offset(row, chunk);
      if constexpr (vectors) {
        copy_async_16_cached(at, pixel == nullptr ? source : pixel + step.first_channel + c, pixel != nullptr);
      } else {
        storage_t numbers[V];
        DYNCONV_UNROLL
        for (int e = 0; e < V; ++e, ++c) {
          if (c == step.channels) {
            c = 0, ++t;
            pixel = row < count && t < step.taps ? source_pixel(n, first + row, step.first_tap + t) : nullptr;
          }
          numbers[e] = pixel != nullptr ? pixel[(step.first_channel + c) * a.source_stride.channel] : storage_t{};
        }
        store(numbers, at);
      }
    }
  };

  // -------------------------------------------------------------------------------------------------------- products
  const auto* const mix = static_cast<const acc_t*>(a.mix);
  auto* const dots = static_cast<acc_t*>(a.dots);
  const int64_t dot_part =
      ((int64_t(g) * a.depth.count() + step_number) * a.output_tiles + output_tile) * a.parts_of_sample + part;
  Sums sums;
  // The sample's sums are complete: to the kernels and, by warps, to the mixing weights.
  auto unmix = [&](int n) {
    acc_t dot[kKernels] = {};
    DYNCONV_UNROLL
    for (int k = 0; k < kKernels; ++k) {
      const acc_t scale = first_kernel + k < a.num_kernels ? mix[int64_t(n) * a.num_kernels + first_kernel + k] : acc_t(0);
      DYNCONV_UNROLL
      for (int i = 0; i < Sums::kCount; ++i) grads[k][i] += scale * sums[i], dot[k] += weights[k][i] * sums[i];
    }
    DYNCONV_UNROLL
    for (int i = 0; i < Sums::kCount; ++i) sums[i] = 0;
    if (a.dots == nullptr) return;
    const acc_t sum = sum_of_four(dot);
    const int lane = thread % 32;
    if (lane % 8 == 0) warp_dots[((n & 1) * kWarps + warp) * kKernels + lane / 8] = sum;
  };
  // After a barrier, before the sample after the next.
  auto write_dots = [&](int n) {
    if (a.dots == nullptr || thread >= kKernels || first_kernel + thread >= a.num_kernels) return;
    acc_t sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += warp_dots[((n & 1) * kWarps + w) * kKernels + thread];
    dots[(dot_part * a.batch + n) * a.num_kernels + first_kernel + thread] = sum;
  };

  int fill = 0;
  if (begin_sample < end_sample && begin_pixel < end_pixel) {
    load(begin_sample, begin_pixel, shared);
    copy_async_commit();
    for (int n = begin_sample; n < end_sample; ++n) {
      for (int first = begin_pixel; first < end_pixel; first += kPixels, fill ^= 1) {
        copy_async_wait<0>();
        __syncthreads();
        if (n > begin_sample && first == begin_pixel) write_dots(n - 1);
        // What comes next, while this is multiplied.
        const bool last = first + kPixels >= end_pixel;
        if (!last || n + 1 < end_sample) {
          load(last ? n + 1 : n, last ? begin_pixel : first + kPixels, shared + (fill ^ 1) * Shared::kOperands);
          copy_async_commit();
        }
        const unsigned char* const from = shared + fill * Shared::kOperands;
        const int count = end_pixel - first < kPixels ? end_pixel - first : kPixels;
        DYNCONV_NO_UNROLL
        for (int slice = 0; slice * Product::kDepth < count; ++slice)
          Product::template add<Shared::kWarpM, Shared::kWarpN>(
              sums, from, warp_m, Shared::kTile, from + Shared::kOutputColumns * Shared::kTile, warp_n, 0, slice);
      }
      unmix(n);
    }
    __syncthreads();
    write_dots(end_sample - 1);
  }
  if (a.sums == nullptr) return;
  const int64_t tile = ((int64_t(g) * a.depth.count() + step_number) * a.output_tiles + output_tile);
  const int64_t tiles = int64_t(a.groups) * a.depth.count() * a.output_tiles;
  DYNCONV_UNROLL
  for (int k = 0; k < kKernels; ++k) {
    if (first_kernel + k >= a.num_kernels) continue;
    auto* const to = static_cast<acc_t*>(a.sums) +
                     ((share * tiles + tile) * a.num_kernels + first_kernel + k) * Shared::kOutputs * T::kRow;
    Product::for_each(grads[k], [&](int m, int n, acc_t sum) { to[(warp_m + m) * T::kRow + warp_n + n] = sum; });
  }
}

// The sum of the shares, to (K, O, C/G, kH, kW).
template <class T>
__global__ void add_weight_shares_kernel(const Depth depth, const typename T::acc_t* sums, int64_t shares, int num_kernels,
                                         int groups, int outputs, int output_tiles, typename T::storage_t* grad_weight,
                                         int64_t count) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  constexpr int kOutputs = WeightShared<T>::kOutputs;
  const int tap = int(i % depth.taps);
  int64_t rest = i / depth.taps;
  const int c = int(rest % depth.channels);
  rest /= depth.channels;
  const int o = int(rest % outputs);
  rest /= outputs;
  const int g = int(rest % groups), k = int(rest / groups);
  const int64_t tile = (int64_t(g) * depth.count() + depth.step(c, tap)) * output_tiles + o / kOutputs;
  const int64_t at = ((tile * num_kernels + k) * kOutputs + o % kOutputs) * depth.row + depth.column(c, tap);
  const int64_t share_size = int64_t(groups) * depth.count() * output_tiles * num_kernels * kOutputs * depth.row;
  typename T::acc_t sum = 0;
  for (int64_t share = 0; share < shares; ++share) sum += sums[share * share_size + at];
  from_acc(sum, grad_weight + i);
}

// How the work is shared out: blocks enough for the device, sums within a bound. A function of sizes and device alone, so
// that results are the same each time.
template <class T>
struct WeightPlan {
  Depth depth;
  int output_tiles, kernel_tiles, samples_of_share, parts_of_sample, pixels_of_part;
  int64_t tiles, shares, share_bytes;

  explicit WeightPlan(const DynamicConv2dParams& p) : depth(p.group_channels(), p.taps(), T::kRow) {
    output_tiles = int(ceil_div(p.group_out_channels(), WeightShared<T>::kOutputs));
    kernel_tiles = int(ceil_div(p.bank.num_kernels, kKernels));
    tiles = p.groups * depth.count() * output_tiles;
    share_bytes = tiles * p.bank.num_kernels * WeightShared<T>::kOutputs * T::kRow * int64_t(sizeof(typename T::acc_t));
    int64_t wanted = ceil_div(int64_t(multiprocessors()) * 4, tiles * kernel_tiles);
    const int64_t affordable = kMostBytes / share_bytes;
    if (wanted > affordable) wanted = affordable;
    if (wanted < 1) wanted = 1;
    samples_of_share = int(wanted < p.batch ? ceil_div(p.batch, wanted) : 1);
    // Parts of a sample are worth their sums from some tiles of pixels on.
    const int64_t most_parts = ceil_div(p.out_pixels(), 4 * kPixels);
    int64_t parts = wanted / p.batch;
    if (parts > most_parts) parts = most_parts;
    if (parts < 1) parts = 1;
    pixels_of_part = int(round_up(ceil_div(p.out_pixels(), parts), kPixels));
    parts_of_sample = int(ceil_div(p.out_pixels(), pixels_of_part));
    shares = ceil_div(p.batch, samples_of_share) * parts_of_sample;
  }

 private:
  static constexpr int64_t kMostBytes = 32 * 1024 * 1024;
};

}  // namespace

template <class T>
int64_t weight_dot_parts(const DynamicConv2dParams& p) {
  const WeightPlan<T> plan(p);
  return plan.tiles * plan.parts_of_sample;
}

template <class T>
int64_t weight_workspace(const DynamicBackwardCall& call) {
  if (call.gradients.weight == nullptr) return 0;
  const WeightPlan<T> plan(call.forward.params);
  return round_up(plan.shares * plan.share_bytes, kWorkspaceAlignment);
}

template <class T>
cudaError_t run_weight(const DynamicBackwardCall& call, void* dots, void* workspace, cudaStream_t stream) {
  const DynamicConv2dParams& p = call.forward.params;
  const WeightPlan<T> plan(p);
  void* const sums = call.gradients.weight != nullptr ? workspace : nullptr;
  const WeightArguments a{Gather::forward(p),
                          plan.depth,
                          call.forward.input,
                          image_strides(p.channels, p.height, p.width, p.channels_last),
                          image_strides(p.out_channels, p.out_height, p.out_width, call.grad_out_channels_last),
                          call.grad_out,
                          call.forward.weight,
                          call.forward.mix,
                          sums,
                          dots,
                          int(p.bank.num_kernels),
                          int(p.group_out_channels()),
                          int(p.groups),
                          int(p.batch),
                          plan.output_tiles,
                          plan.kernel_tiles,
                          plan.samples_of_share,
                          plan.parts_of_sample,
                          plan.pixels_of_part,
                          has_vectors(call.grad_out, call.grad_out_channels_last, p.group_out_channels(), T::kChunk)};
  const bool vectors = has_vectors(call.forward.input, p.channels_last, p.group_channels(), T::kChunk);
  DYNCONV_RETURN_IF_ERROR(launch(vectors ? weight_kernel<T, true> : weight_kernel<T, false>,
                                 plan.tiles * plan.kernel_tiles * plan.shares, kThreads, WeightShared<T>::kBytes, stream, a));
  if (sums == nullptr) return cudaSuccess;
  const int64_t count = p.bank.num_kernels * p.bank.kernel_size();
  return launch(add_weight_shares_kernel<T>, ceil_div(count, kThreads), kThreads, 0, stream, plan.depth,
                static_cast<const typename T::acc_t*>(sums), plan.shares, a.num_kernels, a.groups, a.outputs,
                plan.output_tiles, static_cast<typename T::storage_t*>(call.gradients.weight), count);
}

#define DYNCONV_INSTANTIATE(...)                                                \
  template int64_t weight_dot_parts<__VA_ARGS__>(const DynamicConv2dParams&);    \
  template int64_t weight_workspace<__VA_ARGS__>(const DynamicBackwardCall&);    \
  template cudaError_t run_weight<__VA_ARGS__>(const DynamicBackwardCall&, void*, void*, cudaStream_t);
DYNCONV_FOR_EACH_TYPES(DYNCONV_INSTANTIATE)
#undef DYNCONV_INSTANTIATE

}  // namespace dynamic_cuda
}  // namespace dynconv
