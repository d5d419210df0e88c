// SPDX-License-Identifier: BSD-3-Clause
// Gradients of deform_conv2d with respect to weight and bias.
//
// A block owns one step of the depth (a tap and a chunk of channels of one weight group), a tile of outputs, and a share
// of all pixels. It samples the step's channels at some pixels at a time, as the forward does, and multiplies them with
// the output gradients there: the sum over its pixels stays in registers. The shares' sums are written to the workspace
// and added by a second kernel, in order.
#include "common/cuda/launch.h"
#include "common/cuda/pixel_sums.h"
#include "common/cuda/shares.h"
#include "deform_conv2d/deform_conv2d_direct.h"

namespace dynconv {
namespace deform_cuda {
namespace {

constexpr int kPixels = 64;  // that a block multiplies at a time

struct WeightArguments {
  Geometry geometry;
  Steps steps;
  const void* input;
  ImageStrides input_stride, grad_out_stride;
  const void *offset, *mask;
  StorageType offset_type;
  const void* grad_out;
  bool grad_out_vectors;
  void* sums;  // (shares, steps, output tiles * kOutputs, kRow)
  int64_t rows, rows_of_share;
  int output_tiles;
};

template <class T>
struct WeightShared {
  using acc_t = typename T::acc_t;
  static constexpr int kOutputs = sizeof(acc_t) == 8 ? 64 : 128;  // of a block
  static constexpr int kOutputColumns = kOutputs / T::kRow;       // tiles side by side
  static constexpr int kTile = kPixels * kRowBytes;
  static constexpr int kOperands = (kOutputColumns + 1) * kTile;  // output gradients, then samples
  static constexpr int kSamples = kPixels * int(sizeof(Sample<acc_t>));
  static constexpr int kBytes = 2 * kOperands + 2 * kSamples + 2 * kPixels * int(sizeof(Pixel));
};

template <class T, bool vectors>
__global__ void __launch_bounds__(kThreads, 2) backward_weight_kernel(const WeightArguments a) {
  using storage_t = typename T::storage_t;
  using operand_t = typename T::operand_t;
  using acc_t = typename T::acc_t;
  using Product = dynconv::Product<operand_t, true>;
  using Shared = WeightShared<T>;
  constexpr int kWarpsN = T::kRow >= 64 ? 2 : 1, kWarpsM = kThreads / 32 / kWarpsN;
  constexpr int kWarpM = Shared::kOutputs / kWarpsM, kWarpN = T::kRow / kWarpsN;
  constexpr int kItems = kPixels * kRowChunks / kThreads;
  constexpr int kSlicesOfPixels = kPixels / Product::kDepth;

  unsigned char* const shared = dynamic_shared();
  auto* const samples = reinterpret_cast<Sample<acc_t>*>(shared + 2 * Shared::kOperands);
  auto* const pixels = reinterpret_cast<Pixel*>(samples + 2 * kPixels);
  const int thread = int(threadIdx.x), warp = thread / 32;
  const int output_tile = int(blockIdx.x % unsigned(a.output_tiles));
  const int steps = int(a.steps.count());
  const int step_number = int(blockIdx.x / unsigned(a.output_tiles) % unsigned(steps));
  const int share = int(blockIdx.x / unsigned(a.output_tiles) / unsigned(steps));
  const Step step(a.steps, step_number);
  if (step.channels(a.steps) == 0) return;
  const int64_t begin = share * a.rows_of_share;
  const int64_t end = begin + a.rows_of_share < a.rows ? begin + a.rows_of_share : a.rows;

  const SampleSource<acc_t> source{{a.offset, a.offset_type}, {a.mask, a.offset_type}};
  const Image<storage_t> image{static_cast<const storage_t*>(a.input), a.input_stride};
  const OutputGradients<T> gradients{static_cast<const storage_t*>(a.grad_out), a.grad_out_stride,
                                     a.steps.group_out_channels, a.grad_out_vectors};
  // Where the samples of pixels `row` on are; pixels and samples have two halves each.
  auto locate = [&](int64_t row, int half) {
    if (thread >= kPixels) return;
    const Pixel pixel(a.geometry, row + thread, end);
    pixels[half * kPixels + thread] = pixel;
    samples[half * kPixels + thread] = source.modulated_sample(a.geometry, pixel, step.d, step.tap);
  };

  typename Product::template Sums<kWarpM, kWarpN> sums;
  const int warp_m = warp % kWarpsM * kWarpM, warp_n = warp / kWarpsM * kWarpN;
  int fill = 0;
  locate(begin, 0);
  __syncthreads();
  // `row` is loaded while the product of the pixels before it runs.
  for (int64_t row = begin;; row += kPixels, fill ^= 1) {
    unsigned char* const to = shared + fill * Shared::kOperands;
    const unsigned char* const from = shared + (fill ^ 1) * Shared::kOperands;
    const bool more = row < end;
    if (more) {
      DYNCONV_NO_UNROLL
      for (int column = 0; column < Shared::kOutputColumns; ++column)
        gradients.template load_tile<kPixels>(pixels + fill * kPixels, step.g, output_tile * Shared::kOutputs + column * T::kRow,
                                     to + column * Shared::kTile);
      DYNCONV_NO_UNROLL
      for (int item = 0; item < kItems; ++item) {
        const ChunkPlace<vectors, kPixels> place(thread + item * kThreads);
        const Sample<acc_t>& sample = samples[fill * kPixels + place.row];
        const int channel = step.channel(a.steps) + place.chunk * T::kChunk;
        const int count = chunk_count<T>(step.channels(a.steps), place.chunk);
        SampledChunk<T, vectors> chunk;
        chunk.fetch(image, sample, channel, count);
        chunk.write(image, sample, channel, count,
                    to + Shared::kOutputColumns * Shared::kTile + chunk_offset(place.row, place.chunk));
      }
    }
    if (row > begin) {
      DYNCONV_NO_UNROLL
      for (int slice = 0; slice < kSlicesOfPixels; ++slice)
        Product::template add<kWarpM, kWarpN>(sums, from, warp_m, Shared::kTile,
                                              from + Shared::kOutputColumns * Shared::kTile, warp_n, 0, slice);
    }
    if (!more) break;
    if (row + kPixels < end) locate(row + kPixels, fill ^ 1);
    __syncthreads();
  }

  const int64_t first = ((int64_t(share) * steps + step_number) * a.output_tiles + output_tile) * Shared::kOutputs;
  auto* const to = static_cast<acc_t*>(a.sums) + first * T::kRow;
  Product::for_each(sums, [&](int m, int n, acc_t sum) { to[int64_t(warp_m + m) * T::kRow + warp_n + n] = sum; });
}

// The sum of the shares, to (O, C/G, kH, kW).
template <class T>
__global__ void add_weight_shares_kernel(const Steps steps, const typename T::acc_t* sums, int64_t shares,
                                         int64_t padded_outputs, typename T::storage_t* grad_weight, int64_t count) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  const int tap = int(i % steps.taps);
  const int c = int(i / steps.taps % steps.group_channels);
  const int64_t out_channel = i / steps.taps / steps.group_channels;
  const int g = int(out_channel / steps.group_out_channels), o = int(out_channel % steps.group_out_channels);
  const int channel = g * steps.group_channels + c;
  const int d = channel / steps.offset_channels;
  const int place = channel - steps.begin(g, d);
  const Step step(g, d, tap, place / steps.row);
  const int64_t at = (step.number(steps) * padded_outputs + o) * T::kRow + place % steps.row;
  const int64_t share_size = steps.count() * padded_outputs * T::kRow;
  typename T::acc_t sum = 0;
  for (int64_t share = 0; share < shares; ++share) sum += sums[share * share_size + at];
  from_acc(sum, grad_weight + i);
}

// How many ways the pixels are shared out: blocks enough for the device, but no share below some tiles. A function of
// sizes and device alone, so that results are the same each time.
struct Shares {
  int64_t count, rows;

  Shares(int64_t all_rows, int64_t other_blocks, int64_t least_rows) {
    const int64_t wanted = ceil_div(int64_t(multiprocessors()) * 4, other_blocks);
    const int64_t most = ceil_div(all_rows, least_rows);
    count = wanted < most ? wanted : most;
    if (count < 1) count = 1;
    rows = round_up(ceil_div(all_rows, count), kPixels);
    count = ceil_div(all_rows, rows);
  }
};

template <class T>
struct WeightPlan {
  Steps steps;
  int64_t rows, output_tiles;
  Shares weight, bias;

  explicit WeightPlan(const DeformConv2dParams& p)
      : steps(p, T::kRow),
        rows(p.batch * p.out_pixels()),
        output_tiles(ceil_div(p.group_out_channels(), WeightShared<T>::kOutputs)),
        weight(rows, steps.count() * output_tiles, 8 * kPixels),
        bias(rows, ceil_div(p.out_channels, 32), 16 * kPixels) {}
  int64_t padded_outputs() const { return output_tiles * WeightShared<T>::kOutputs; }
  int64_t weight_bytes(const DeformConv2dParams& p) const {
    if (is_direct(p)) return direct_weight_workspace<typename T::storage_t>(p);
    return round_up(weight.count * steps.count() * padded_outputs() * T::kRow * int64_t(sizeof(typename T::acc_t)),
                    kWorkspaceAlignment);
  }
  int64_t bias_bytes(int64_t outputs) const { return bias.count * outputs * int64_t(sizeof(typename T::acc_t)); }
};

}  // namespace

template <class T>
int64_t weight_workspace(const DeformBackwardCall& call) {
  const WeightPlan<T> plan(call.forward.params);
  return (call.gradients.weight != nullptr ? plan.weight_bytes(call.forward.params) : 0) +
         (call.gradients.bias != nullptr ? plan.bias_bytes(call.forward.params.out_channels) : 0);
}

template <class T>
cudaError_t run_backward_weight(const DeformBackwardCall& call, void* workspace, cudaStream_t stream) {
  using storage_t = typename T::storage_t;
  using acc_t = typename T::acc_t;
  const DeformConv2dParams& p = call.forward.params;
  const WeightPlan<T> plan(p);
  const ImageStrides grad_out_stride = image_strides(p.out_channels, p.out_height, p.out_width, call.grad_out_channels_last);
  auto* sums = static_cast<unsigned char*>(workspace);
  if (call.gradients.weight != nullptr && is_direct(p)) {
    DYNCONV_RETURN_IF_ERROR(run_direct_weight<storage_t>(call, sums, stream));
  } else if (call.gradients.weight != nullptr) {
    const WeightArguments a{Geometry(p),
                            plan.steps,
                            call.forward.input,
                            image_strides(p.channels, p.height, p.width, p.channels_last),
                            grad_out_stride,
                            call.forward.offset,
                            call.forward.mask,
                            call.forward.offset_type,
                            call.grad_out,
                            has_output_vectors<T>(call),
                            sums,
                            plan.rows,
                            plan.weight.rows,
                            int(plan.output_tiles)};
    const bool vectors = has_vectors(call.forward.input, p.channels_last, p.channels, p.group_channels(),
                                     p.channels / p.offset_groups, T::kChunk);
    const auto kernel = vectors ? backward_weight_kernel<T, true> : backward_weight_kernel<T, false>;
    DYNCONV_RETURN_IF_ERROR(launch(kernel, plan.weight.count * plan.steps.count() * plan.output_tiles, kThreads,
                                   WeightShared<T>::kBytes, stream, a));
    const int64_t count = p.out_channels * p.group_channels() * p.taps();
    DYNCONV_RETURN_IF_ERROR(launch(add_weight_shares_kernel<T>, ceil_div(count, kThreads), kThreads, 0, stream, plan.steps,
                                   reinterpret_cast<const acc_t*>(sums), plan.weight.count, plan.padded_outputs(),
                                   static_cast<storage_t*>(call.gradients.weight), count));
  }
  if (call.gradients.weight != nullptr) sums += plan.weight_bytes(p);
  if (call.gradients.bias != nullptr) {
    const int outputs = int(p.out_channels);
    DYNCONV_RETURN_IF_ERROR(launch_pixel_sums<T>(static_cast<const storage_t*>(call.grad_out), grad_out_stride,
                                                 p.out_pixels(), plan.rows, plan.bias.rows, outputs,
                                                 reinterpret_cast<acc_t*>(sums), stream));
    DYNCONV_RETURN_IF_ERROR(add_shares(reinterpret_cast<const acc_t*>(sums), plan.bias.count, outputs,
                                       static_cast<storage_t*>(call.gradients.bias), stream));
  }
  return cudaSuccess;
}

#define DYNCONV_INSTANTIATE(...)                                            \
  template int64_t weight_workspace<__VA_ARGS__>(const DeformBackwardCall&); \
  template cudaError_t run_backward_weight<__VA_ARGS__>(const DeformBackwardCall&, void*, cudaStream_t);
DYNCONV_FOR_EACH_TYPES(DYNCONV_INSTANTIATE)
#undef DYNCONV_INSTANTIATE

}  // namespace deform_cuda
}  // namespace dynconv
