// SPDX-License-Identifier: BSD-3-Clause
// Gradients of dynamic_conv2d with respect to weight and mixing weights, with few inputs and outputs a group.
//
// A block owns some units of channels, some taps, some kernels of the bank, and a share: some samples, or a piece of
// one sample's pixels. A unit is an input channel, or, where each group has one channel on both sides, kChunk
// neighbouring groups. An item is a unit at up to kTaps neighbouring taps of a row of the kernel; its gradients are in
// registers, summed over pixels by as many threads as the block has to spare, then over these threads in shared memory.
// That is the gradient g of the sample's kernel, which goes nowhere else: mix[k] * g is added to the block's gradient
// of each weight[k], and <weight[k], g> is a part of the gradient of mix[k]. The shares' gradients of the weight are
// written to the workspace and added by a second kernel. All sums have a fixed order.
#include "common/cuda/launch.h"
#include "common/cuda/shares.h"
#include "dynamic_conv2d/dynamic_conv2d_direct.h"

namespace dynconv {
namespace dynamic_cuda {
namespace {

constexpr int kMixedAtOnce = 4;
constexpr int kSharedBytes = 80 * 1024;      // of a block
constexpr int kGradientBytes = 20 * 1024;    // of it, a sample's gradients
constexpr int kPixelsOfThread = 8;           // at least, before a sample is cut in pieces

template <class T>
constexpr int kThreads = sizeof(typename T::acc_t) == 8 ? 128 : 256;  // of a block, at most

struct WeightArguments {
  const void* input;
  ImageStrides input_stride;
  const void* grad_out;
  ImageStrides grad_out_stride;
  const void *weight, *mix;
  void* sums;  // (shares, K, O, C/G, kH, kW); null: not wanted
  void* dots;  // (parts, N, K); null: not wanted
  int64_t kernel_size;
  int batch, num_kernels, group_channels, group_out_channels;
  int height, width, out_width;
  int64_t out_pixels;
  int kernel_height, kernel_width;
  int stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;
  bool lanes_are_pixels;  // neighbouring threads have neighbouring pixels; else neighbouring units
  int units, block_units, unit_tiles;
  int row_chunks;                                 // items in a row of the kernel
  int tap_items, block_tap_items, tap_tiles;      // rows * row_chunks
  int threads_of_item, parts_of_item;             // parts: of these threads' sums, in shared memory
  int block_kernels, kernel_tiles;
  int64_t samples_of_share, pieces, pixels_of_piece, shares;

  __host__ __device__ int items() const { return block_units * block_tap_items; }
};

// kChunk groups (M = kChunk), or an input channel with M outputs of its group, at kTaps taps.
template <class T, bool vectors, int M, int kTaps>
struct WeightItem {
  using storage_t = typename T::storage_t;
  using acc_t = typename T::acc_t;

  int group, channel, out_channel;  // the first of each
  int row, column, taps;            // of the kernel: the first tap, and how many exist

  DYNCONV_DEVICE WeightItem(const WeightArguments& a, int unit, int tap_item) {
    channel = vectors ? unit * M : unit;
    group = channel / a.group_channels;
    out_channel = group * a.group_out_channels;
    row = tap_item / a.row_chunks;
    column = tap_item % a.row_chunks * kTaps;
    taps = a.kernel_width - column < kTaps ? a.kernel_width - column : kTaps;
  }

  // Adds every step-th of the pixels [begin, end).
  DYNCONV_DEVICE void add_pixels(const WeightArguments& a, int64_t sample, int64_t begin, int64_t end, int step,
                                 acc_t (&sums)[M][kTaps]) const {
    const auto* const input = static_cast<const storage_t*>(a.input) + sample * a.input_stride.batch +
                              channel * a.input_stride.channel;
    const auto* const grad_out = static_cast<const storage_t*>(a.grad_out) + sample * a.grad_out_stride.batch +
                                 out_channel * a.grad_out_stride.channel;
    const int step_y = step / a.out_width, step_x = step - step_y * a.out_width;
    const int first_y = row * a.dilation_height - a.padding_height;
    const int first_x = column * a.dilation_width - a.padding_width;
    int out_y = int(begin / a.out_width), out_x = int(begin % a.out_width);
    DYNCONV_NO_UNROLL
    for (int64_t pixel = begin; pixel < end; pixel += step) {
      const int y = out_y * a.stride_height + first_y, x = out_x * a.stride_width + first_x;
      if (unsigned(y) < unsigned(a.height)) {
        const storage_t* const g = grad_out + (out_y * a.grad_out_stride.row + out_x * a.grad_out_stride.pixel);
        const int64_t at = y * a.input_stride.row + x * a.input_stride.pixel;
        const int64_t move = a.dilation_width * a.input_stride.pixel;
        // Tap t is there, and reads inside the image. x + t * dilation is modulo 2^32 where the tap isn't there.
        auto inside = [&](int t) {
          return t < taps && unsigned(x) + unsigned(t) * unsigned(a.dilation_width) < unsigned(a.width);
        };
        acc_t vg[M];
        if constexpr (vectors) {
          ChannelChunk<T, true> read_g, read[kTaps];
          read_g.load(g, 1, 1);
          DYNCONV_UNROLL
          for (int t = 0; t < kTaps; ++t) read[t].load(input + (at + t * move), 1, int(inside(t)));
          read_g.get(vg);
          DYNCONV_UNROLL
          for (int t = 0; t < kTaps; ++t) {
            acc_t v[M];
            read[t].get(v);
            DYNCONV_UNROLL
            for (int m = 0; m < M; ++m) sums[m][t] += vg[m] * v[m];
          }
        } else {
          acc_t v[kTaps];
          DYNCONV_UNROLL
          for (int m = 0; m < M; ++m)
            vg[m] = m < a.group_out_channels ? to_acc(g[m * a.grad_out_stride.channel]) : acc_t(0);
          DYNCONV_UNROLL
          for (int t = 0; t < kTaps; ++t) v[t] = inside(t) ? to_acc(input[at + t * move]) : acc_t(0);
          DYNCONV_UNROLL
          for (int t = 0; t < kTaps; ++t)
            DYNCONV_UNROLL
            for (int m = 0; m < M; ++m) sums[m][t] += vg[m] * v[t];
        }
      }
      out_y += step_y, out_x += step_x;
      if (out_x >= a.out_width) out_x -= a.out_width, ++out_y;
    }
  }
};

// Gradients of a block: number q is row q / taps (unit * M + m) and tap q % taps. The sums over pixels have another
// order: (part, item, m, tap of the item), where neighbouring items don't meet in a bank.
template <class T, int M, int kTaps>
struct WeightShared {
  using acc_t = typename T::acc_t;
  static constexpr int kItem = (M * kTaps) | 1;

  int items, block_units, block_taps, rows;
  int64_t* row_places;  // where the row begins in a kernel, -1 for none
  acc_t *parts, *sums, *warp_dots;
  int* taps;  // which taps of a row, -1 for none

  DYNCONV_DEVICE explicit WeightShared(const WeightArguments& a)
      : items(a.items()), block_units(a.block_units), block_taps(a.block_tap_items * kTaps), rows(block_units * M) {
    row_places = reinterpret_cast<int64_t*>(dynamic_shared());
    parts = reinterpret_cast<acc_t*>(row_places + rows);
    sums = parts + a.parts_of_item * items * kItem;
    warp_dots = sums + (a.sums != nullptr ? a.block_kernels * size() : 0);
    taps = reinterpret_cast<int*>(warp_dots + (a.dots != nullptr ? a.block_kernels * (int(blockDim.x) / 32) : 0));
  }
  DYNCONV_DEVICE int size() const { return items * M * kTaps; }
  DYNCONV_DEVICE acc_t* part(int number, int item) const { return parts + (number * items + item) * kItem; }
  DYNCONV_DEVICE acc_t* part(int number, int row, int tap) const {
    return part(number, tap / kTaps * block_units + row / M) + row % M * kTaps + tap % kTaps;
  }

  static int64_t bytes(const WeightArguments& a, int kernels, int threads) {
    const int64_t size = int64_t(a.items()) * M * kTaps;
    return a.block_units * M * 8 + a.block_tap_items * kTaps * 4 +
           int64_t(sizeof(acc_t)) * (a.parts_of_item * int64_t(a.items()) * kItem +
                                     (a.sums != nullptr ? kernels * size : 0) +
                                     (a.dots != nullptr ? kernels * (threads / 32) : 0));
  }
};

template <class acc_t>
DYNCONV_DEVICE acc_t warp_sum(acc_t value) {
  DYNCONV_UNROLL
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <class T, bool vectors, int M, int kTaps>
__global__ void __launch_bounds__(kThreads<T>, 2)
    direct_weight_kernel(const __grid_constant__ WeightArguments a) {
  using storage_t = typename T::storage_t;
  using acc_t = typename T::acc_t;
  const WeightShared<T, M, kTaps> shared(a);
  const int thread = int(threadIdx.x), threads = int(blockDim.x), items = a.items();
  unsigned rest = blockIdx.x;
  const int unit_tile = int(rest % unsigned(a.unit_tiles));
  rest /= unsigned(a.unit_tiles);
  const int tap_tile = int(rest % unsigned(a.tap_tiles));
  rest /= unsigned(a.tap_tiles);
  const int first_kernel = int(rest % unsigned(a.kernel_tiles)) * a.block_kernels;
  const int64_t share = rest / unsigned(a.kernel_tiles);
  const int end_kernel =
      a.num_kernels - first_kernel < a.block_kernels ? a.num_kernels : first_kernel + a.block_kernels;
  const int64_t piece = share % a.pieces, first_sample = share / a.pieces * a.samples_of_share;
  const int64_t end_sample =
      first_sample + a.samples_of_share < a.batch ? first_sample + a.samples_of_share : int64_t(a.batch);

  const int item = a.lanes_are_pixels ? thread / a.threads_of_item : thread % items;
  const int slot = a.lanes_are_pixels ? thread % a.threads_of_item : thread / items;
  const int unit = unit_tile * a.block_units + item % a.block_units;
  const int tap_item = tap_tile * a.block_tap_items + item / a.block_units;
  const bool exists = slot < a.threads_of_item && unit < a.units && tap_item < a.tap_items;
  const WeightItem<T, vectors, M, kTaps> own(a, exists ? unit : 0, exists ? tap_item : 0);

  for (int row = thread; row < shared.rows; row += threads) {
    const int row_unit = unit_tile * a.block_units + row / M, m = row % M;
    const WeightItem<T, vectors, M, kTaps> row_item(a, row_unit < a.units ? row_unit : 0, 0);
    const int64_t taps = int64_t(a.kernel_height) * a.kernel_width;
    // Where groups have one channel, the output channel is the input channel.
    const int64_t out_channel = (vectors ? row_item.channel : row_item.out_channel) + m;
    const bool row_exists = row_unit < a.units && (vectors || m < a.group_out_channels);
    shared.row_places[row] =
        row_exists ? (out_channel * a.group_channels + row_item.channel % a.group_channels) * taps : -1;
  }
  for (int tap = thread; tap < shared.block_taps; tap += threads) {
    const int number = tap_tile * a.block_tap_items + tap / kTaps, column = number % a.row_chunks * kTaps + tap % kTaps;
    shared.taps[tap] =
        number < a.tap_items && column < a.kernel_width ? number / a.row_chunks * a.kernel_width + column : -1;
  }
  __syncthreads();

  // Calls f(q, row, tap, place in a kernel) for the gradients that are the thread's: the same ones each time.
  auto for_each = [&](auto f) {
    for (int q = thread; q < shared.size(); q += threads) {
      const int row = q / shared.block_taps, tap = q - row * shared.block_taps;
      if (shared.row_places[row] >= 0 && shared.taps[tap] >= 0)
        f(q, row, tap, shared.row_places[row] + shared.taps[tap]);
    }
  };
  if (a.sums != nullptr)
    for (int i = thread; i < (end_kernel - first_kernel) * shared.size(); i += threads) shared.sums[i] = 0;
  // The zeros above are other threads'; the barrier after the first sample's pixels is before their use.

  const auto* const weight = static_cast<const storage_t*>(a.weight);
  const int64_t begin = piece * a.pixels_of_piece;
  const int64_t end = begin + a.pixels_of_piece < a.out_pixels ? begin + a.pixels_of_piece : a.out_pixels;
  for (int64_t sample = first_sample; sample < end_sample; ++sample) {
    acc_t gradients[M][kTaps] = {};
    if (exists) own.add_pixels(a, sample, begin + slot, end, a.threads_of_item, gradients);
    if (a.lanes_are_pixels)
      DYNCONV_UNROLL
      for (int i = 0; i < M * kTaps; ++i) gradients[i / kTaps][i % kTaps] = warp_sum(gradients[i / kTaps][i % kTaps]);
    if (a.lanes_are_pixels ? thread % 32 == 0 : slot < a.threads_of_item) {
      acc_t* const to = shared.part(a.lanes_are_pixels ? slot / 32 : slot, item);
      DYNCONV_UNROLL
      for (int i = 0; i < M * kTaps; ++i) to[i] = gradients[i / kTaps][i % kTaps];
    }
    __syncthreads();

    const auto* const mix = static_cast<const acc_t*>(a.mix) + sample * a.num_kernels;
    for (int first = first_kernel; first < end_kernel; first += kMixedAtOnce) {
      acc_t w[kMixedAtOnce], dots[kMixedAtOnce] = {};
      DYNCONV_UNROLL
      for (int k = 0; k < kMixedAtOnce; ++k) w[k] = first + k < end_kernel ? mix[first + k] : acc_t(0);
      for_each([&](int q, int row, int tap, int64_t place) {
        acc_t* const whole = shared.part(0, row, tap);
        acc_t g = *whole;
        if (first == first_kernel) {
          for (int part = 1; part < a.parts_of_item; ++part) g += *shared.part(part, row, tap);
          *whole = g;
        }
        DYNCONV_UNROLL
        for (int k = 0; k < kMixedAtOnce; ++k) {
          if (first + k >= end_kernel) continue;
          if (a.sums != nullptr) shared.sums[(first - first_kernel + k) * shared.size() + q] += w[k] * g;
          if (a.dots != nullptr) dots[k] += to_acc(weight[(first + k) * a.kernel_size + place]) * g;
        }
      });
      if (a.dots == nullptr) continue;
      DYNCONV_UNROLL
      for (int k = 0; k < kMixedAtOnce; ++k) {
        const acc_t sum = warp_sum(dots[k]);
        if (thread % 32 == 0 && first + k < end_kernel)
          shared.warp_dots[thread / 32 * a.block_kernels + first - first_kernel + k] = sum;
      }
    }
    // The parts have been read, and the warps' dots written.
    __syncthreads();
    if (a.dots == nullptr) continue;
    const int64_t part = (int64_t(tap_tile) * a.unit_tiles + unit_tile) * a.pieces + piece;
    for (int k = first_kernel + thread; k < end_kernel; k += threads) {
      acc_t sum = 0;
      for (int warp = 0; warp < threads / 32; ++warp)
        sum += shared.warp_dots[warp * a.block_kernels + k - first_kernel];
      static_cast<acc_t*>(a.dots)[(part * a.batch + sample) * a.num_kernels + k] = sum;
    }
  }

  if (a.sums == nullptr) return;
  auto* const to = static_cast<acc_t*>(a.sums) + share * a.num_kernels * a.kernel_size;
  for (int k = first_kernel; k < end_kernel; ++k)
    for_each([&](int q, int, int, int64_t place) {
      to[k * a.kernel_size + place] = shared.sums[(k - first_kernel) * shared.size() + q];
    });
}

// ------------------------------------------------------------------------------------------------------------- host

// Taps of an item: fewest reads of input and grad_out.
int taps_of_item(int64_t kernel_width) {
  if (kernel_width == 1) return 1;
  return ceil_div(kernel_width, 3) * 4 < ceil_div(kernel_width, 5) * 6 ? 3 : 5;
}

// Cuts the work up: a function of sizes, layouts and device alone, so that results are the same each time.
template <class T, bool vectors, int M, int kTaps>
struct WeightPlan {
  WeightArguments a;
  int threads;

  WeightPlan(const DynamicBackwardCall& call, void* sums, void* dots) {
    const DynamicConv2dParams& p = call.forward.params;
    a = {};
    a.input = call.forward.input;
    a.input_stride = image_strides(p.channels, p.height, p.width, p.channels_last);
    a.grad_out = call.grad_out;
    a.grad_out_stride = image_strides(p.out_channels, p.out_height, p.out_width, call.grad_out_channels_last);
    a.weight = call.forward.weight, a.mix = call.forward.mix;
    a.sums = sums, a.dots = dots;
    a.kernel_size = p.bank.kernel_size();
    a.batch = int(p.batch), a.num_kernels = int(p.bank.num_kernels);
    a.group_channels = int(p.group_channels()), a.group_out_channels = int(p.group_out_channels());
    a.height = int(p.height), a.width = int(p.width), a.out_width = int(p.out_width);
    a.out_pixels = p.out_pixels();
    a.kernel_height = int(p.kernel_height), a.kernel_width = int(p.kernel_width);
    a.stride_height = int(p.stride_height), a.stride_width = int(p.stride_width);
    a.padding_height = int(p.padding_height), a.padding_width = int(p.padding_width);
    a.dilation_height = int(p.dilation_height), a.dilation_width = int(p.dilation_width);
    a.lanes_are_pixels = !p.channels_last;
    a.units = int(vectors ? p.channels / M : p.channels);
    a.row_chunks = int(ceil_div(p.kernel_width, kTaps));
    a.tap_items = a.kernel_height * a.row_chunks;
    cut_items();
    cut_kernels();
    cut_samples();
  }

  int64_t blocks() const { return a.shares * a.kernel_tiles * tiles(); }
  int64_t tiles() const { return int64_t(a.unit_tiles) * a.tap_tiles; }
  int64_t parts() const { return tiles() * a.pieces; }
  int64_t bytes() const { return WeightShared<T, M, kTaps>::bytes(a, a.block_kernels, threads); }

 private:
  void cut_items() {
    const int most_items = kGradientBytes / (M * kTaps * int(sizeof(typename T::acc_t)));
    if (a.lanes_are_pixels) {
      const int warps = kThreads<T> / 32;
      a.block_tap_items = least(a.tap_items, warps);
      a.block_units = least(a.units, warps / a.block_tap_items);
      a.threads_of_item = warps / a.items() * 32;
      a.parts_of_item = a.threads_of_item / 32;
    } else {
      // 8 units of 16 bytes, or 32 numbers, fill lines of memory.
      a.block_units = least(a.units, vectors ? 8 : 32);
      a.block_tap_items = least(a.tap_items, least(most_items, kThreads<T>) / a.block_units);
      const int most = kThreads<T> / a.items();
      a.threads_of_item = a.out_pixels < most ? int(a.out_pixels) : most;
      a.parts_of_item = a.threads_of_item;
    }
    threads = int(round_up(int64_t(a.items()) * a.threads_of_item, 32));
    a.unit_tiles = int(ceil_div(a.units, a.block_units));
    a.tap_tiles = int(ceil_div(a.tap_items, a.block_tap_items));
  }
  void cut_kernels() {
    using Shared = WeightShared<T, M, kTaps>;
    const int64_t one = Shared::bytes(a, 1, threads) - Shared::bytes(a, 0, threads);
    const int64_t most = one == 0 ? a.num_kernels : (kSharedBytes - Shared::bytes(a, 0, threads)) / one;
    a.block_kernels = int(most < 1 ? 1 : most < a.num_kernels ? most : a.num_kernels);
    a.kernel_tiles = int(ceil_div(a.num_kernels, a.block_kernels));
  }
  void cut_samples() {
    const int64_t wanted = ceil_div(int64_t(multiprocessors()) * 4, tiles() * a.kernel_tiles);
    a.samples_of_share = ceil_div(a.batch, wanted);
    a.pieces = 1;
    if (a.samples_of_share == 1) {
      const int64_t most = ceil_div(a.out_pixels, int64_t(a.threads_of_item) * kPixelsOfThread);
      const int64_t pieces = ceil_div(wanted, a.batch);
      a.pieces = pieces < most ? pieces : most;
    }
    a.pixels_of_piece = ceil_div(a.out_pixels, a.pieces);
    a.pieces = ceil_div(a.out_pixels, a.pixels_of_piece);
    a.shares = ceil_div(a.batch, a.samples_of_share) * a.pieces;
  }
  static int least(int x, int y) { return x < y ? x : y; }
};

template <class T, bool vectors, int M, int kTaps>
struct Variant {
  using Plan = WeightPlan<T, vectors, M, kTaps>;
  static constexpr auto kernel = direct_weight_kernel<T, vectors, M, kTaps>;
};

// Calls f with the Variant for a call. Groups of several outputs are rare enough for one number of taps.
template <class T, class F>
auto dispatch_variant(const DynamicBackwardCall& call, F f) {
  const DynamicConv2dParams& p = call.forward.params;
  constexpr int V = T::kChunk;
  const int taps = taps_of_item(p.kernel_width);
  const int64_t outputs = p.group_out_channels();
  if (p.group_channels() == 1 && outputs == 1 && p.channels % V == 0 && p.channels_last &&
      call.grad_out_channels_last && is_aligned(call.forward.input, 16) && is_aligned(call.grad_out, 16)) {
    if (taps == 1) return f(Variant<T, true, V, 1>());
    if (taps == 3) return f(Variant<T, true, V, 3>());
    return f(Variant<T, true, V, 5>());
  }
  if (outputs == 1) {
    if (taps == 1) return f(Variant<T, false, 1, 1>());
    if (taps == 3) return f(Variant<T, false, 1, 3>());
    return f(Variant<T, false, 1, 5>());
  }
  if (outputs == 2) return f(Variant<T, false, 2, 3>());
  if (outputs <= 4) return f(Variant<T, false, 4, 3>());
  return f(Variant<T, false, 8, 3>());
}

}  // namespace

template <class T>
int64_t direct_weight_workspace(const DynamicBackwardCall& call, int64_t* parts) {
  return dispatch_variant<Exact<T>>(call, [&](auto variant) {
    // How the work is cut depends on what is wanted, not on where it goes.
    const typename decltype(variant)::Plan plan(call, call.gradients.weight, call.gradients.attention);
    *parts = plan.parts();
    if (call.gradients.weight == nullptr) return int64_t(0);
    return plan.a.shares * plan.a.num_kernels * plan.a.kernel_size * int64_t(sizeof(typename T::acc_t));
  });
}

template <class T>
cudaError_t run_direct_weight(const DynamicBackwardCall& call, void* workspace, void* dots, cudaStream_t stream) {
  if (call.gradients.weight == nullptr && dots == nullptr) return cudaSuccess;
  return dispatch_variant<Exact<T>>(call, [&](auto variant) {
    const typename decltype(variant)::Plan plan(call, call.gradients.weight != nullptr ? workspace : nullptr, dots);
    DYNCONV_RETURN_IF_ERROR(
        launch(variant.kernel, plan.blocks(), plan.threads, size_t(plan.bytes()), stream, plan.a));
    if (call.gradients.weight == nullptr) return cudaSuccess;
    const int64_t count = plan.a.num_kernels * plan.a.kernel_size;
    return add_shares(static_cast<const typename T::acc_t*>(workspace), plan.a.shares, count,
                      static_cast<typename T::storage_t*>(call.gradients.weight), stream);
  });
}

#define DYNCONV_INSTANTIATE(...)                                                            \
  template int64_t direct_weight_workspace<__VA_ARGS__>(const DynamicBackwardCall&, int64_t*); \
  template cudaError_t run_direct_weight<__VA_ARGS__>(const DynamicBackwardCall&, void*, void*, cudaStream_t);
DYNCONV_FOR_EACH_TYPES(DYNCONV_INSTANTIATE)
#undef DYNCONV_INSTANTIATE

}  // namespace dynamic_cuda
}  // namespace dynconv
