// SPDX-License-Identifier: BSD-3-Clause
// Forward of deform_conv2d: a block samples a tile of pixels x channels into shared memory, a step of the depth at a
// time, and multiplies it with the weight there; no columns in global memory.
//
// While the product of one step runs, the next step's samples are fetched and written to the other half of the shared
// memory, and its weights copied. Where a tap samples is found once a tap, and read by all channels.
#include "common/cuda/launch.h"
#include "deform_conv2d/deform_conv2d_direct.h"

namespace dynconv {
namespace deform_cuda {
namespace {

// A block's output: kPixels x kOutputs, by warps that stand kWarpsM x kWarpsN.
template <int pixels, int outputs, int warps_m, int warps_n>
struct Tile {
  static constexpr int kPixels = pixels, kOutputs = outputs, kWarpsM = warps_m;
  static constexpr int kWarpM = pixels / warps_m, kWarpN = outputs / warps_n;
  static_assert(warps_m * warps_n * 32 == kThreads);
};

struct ForwardArguments {
  Geometry geometry;
  Steps steps;
  const void* input;
  ImageStrides input_stride, out_stride;
  const void *offset, *mask;
  StorageType offset_type;
  const void* packed_weight;  // (steps, padded_outputs, kRow) operands
  const void* bias;
  void* out;
  int64_t rows;
  int output_tiles, padded_outputs;
};

template <class T, class Tile>
struct ForwardShared {
  static constexpr int kOperands = (Tile::kPixels + Tile::kOutputs) * kRowBytes;  // samples, then weights
  static constexpr int kSamples = Tile::kPixels * int(sizeof(Sample<typename T::acc_t>));
  static constexpr int kPixels = Tile::kPixels * int(sizeof(Pixel));
  static constexpr int kBytes = 2 * kOperands + 2 * kSamples + kPixels;
};

template <class T, bool vectors, class Tile>
__global__ void __launch_bounds__(kThreads, std::is_same_v<typename T::operand_t, typename T::acc_t> ? 1 : 2)
    forward_kernel(const ForwardArguments a) {
  using storage_t = typename T::storage_t;
  using operand_t = typename T::operand_t;
  using acc_t = typename T::acc_t;
  using Product = dynconv::Product<operand_t, false>;
  using Shared = ForwardShared<T, Tile>;
  constexpr int kItems = Tile::kPixels * kRowChunks / kThreads;  // chunks of samples that a thread fetches a step
  static_assert(kItems == 1 || kItems == 2 || kItems == 4);
  // A plain product needs the registers, and leaves time for fetching as it is.
  constexpr bool kPrefetches = !std::is_same_v<operand_t, acc_t>;

  unsigned char* const shared = dynamic_shared();
  auto* const samples = reinterpret_cast<Sample<acc_t>*>(shared + 2 * Shared::kOperands);
  const int thread = int(threadIdx.x), warp = thread / 32;
  const int output_tile = int(blockIdx.x % unsigned(a.output_tiles));
  const int64_t rest = blockIdx.x / unsigned(a.output_tiles);
  const int g = int(rest % a.steps.groups);
  const int64_t first_row = rest / a.steps.groups * Tile::kPixels;
  const int first_output = output_tile * Tile::kOutputs;

  const SampleSource<acc_t> source{{a.offset, a.offset_type}, {a.mask, a.offset_type}};
  const Image<storage_t> image{static_cast<const storage_t*>(a.input), a.input_stride};
  // Read once a tap only: registers are worth more.
  auto* const pixels = reinterpret_cast<Pixel*>(samples + 2 * Tile::kPixels);
  if (thread < Tile::kPixels) pixels[thread] = Pixel(a.geometry, first_row + thread, a.rows);
  // Samples of neighbouring taps stand in turn in two buffers.
  auto samples_of = [&](const Step& step) { return samples + ((step.d * a.steps.taps + step.tap) & 1) * Tile::kPixels; };
  auto locate = [&](const Step& step) {
    if (thread < Tile::kPixels)
      samples_of(step)[thread] = source.modulated_sample(a.geometry, pixels[thread], step.d, step.tap);
  };
  auto copy_weight = [&](const Step& step, unsigned char* to) {
    const auto* from = static_cast<const unsigned char*>(a.packed_weight) +
                       (int64_t(step.number(a.steps)) * a.padded_outputs + first_output) * kRowBytes;
    for (int i = thread; i < Tile::kOutputs * kRowChunks; i += kThreads)
      copy_async_16(to + chunk_offset(i / kRowChunks, i % kRowChunks), from + i * 16);
  };

  typename Product::template Sums<Tile::kWarpM, Tile::kWarpN> sums;
  const int warp_m = warp % Tile::kWarpsM * Tile::kWarpM, warp_n = warp / Tile::kWarpsM * Tile::kWarpN;

  // Samples `ahead` into one half of the shared memory, and multiplies what is in the other; either may be left out.
  Step ahead(g, a.steps.first_offset_group(g), 0, 0);
  int fill = 0;
  auto work = [&](auto samples_ahead, auto multiplies) {
    constexpr bool kSamplesAhead = decltype(samples_ahead)::value, kMultiplies = decltype(multiplies)::value;
    unsigned char* const to = shared + fill * Shared::kOperands;
    const unsigned char* const from = shared + (fill ^ 1) * Shared::kOperands;
    if constexpr (kSamplesAhead) {
      copy_weight(ahead, to + Tile::kPixels * kRowBytes);
      copy_async_commit();
    }
    // Rolled: unrolled, its addresses alone would fill the registers.
    DYNCONV_NO_UNROLL
    for (int slice = 0; slice < kSlices; ++slice) {
      const bool fetches = kSamplesAhead && slice % (kSlices / kItems) == 0;
      const ChunkPlace<vectors, Tile::kPixels> place(thread + slice / (kSlices / kItems) * kThreads);
      const Sample<acc_t>& sample = samples_of(ahead)[place.row];
      const int channel = ahead.channel(a.steps) + place.chunk * T::kChunk;
      const int count = chunk_count<T>(ahead.channels(a.steps), place.chunk);
      SampledChunk<T, vectors> chunk;
      if (kPrefetches && fetches) chunk.fetch(image, sample, channel, count);
      if constexpr (kMultiplies)
        Product::template add<Tile::kWarpM, Tile::kWarpN>(sums, from, warp_m, 0, from + Tile::kPixels * kRowBytes, warp_n, 0,
                                                          slice);
      if (!kPrefetches && fetches) chunk.fetch(image, sample, channel, count);
      if (fetches) chunk.write(image, sample, channel, count, to + chunk_offset(place.row, place.chunk));
    }
  };
  // To the step after `ahead`, whose samples, weights and places are then there for all. False after the last step.
  auto advance = [&] {
    const int tap = ahead.tap, d = ahead.d;
    const bool more = ahead.advance_in_group(a.steps);
    if (more && (ahead.tap != tap || ahead.d != d)) locate(ahead);
    fill ^= 1;
    copy_async_wait<0>();
    __syncthreads();
    return more;
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  locate(ahead);
  __syncthreads();
  work(yes, no);
  while (advance()) work(yes, yes);
  work(no, yes);

  // Where the rows' outputs are, in place of the samples, which nobody has read since the last barrier.
  auto* const row_out = reinterpret_cast<int64_t*>(samples);
  if (thread < Tile::kPixels) {
    const Pixel pixel = pixels[thread];
    row_out[thread] = pixel.image < 0 ? -1
                                      : pixel.image * a.out_stride.batch + pixel.y * a.out_stride.row +
                                            pixel.x * a.out_stride.pixel;
  }
  __syncthreads();
  auto* const out = static_cast<storage_t*>(a.out);
  const auto* const bias = static_cast<const storage_t*>(a.bias);
  const int outputs = a.steps.group_out_channels;
  Product::for_each(sums, [&](int m, int n, acc_t sum) {
    const int64_t at = row_out[warp_m + m];
    const int o = first_output + warp_n + n;
    if (at < 0 || o >= outputs) return;
    const int64_t channel = int64_t(g) * outputs + o;
    if (bias != nullptr) sum += to_acc(bias[channel]);
    from_acc(sum, out + at + channel * a.out_stride.channel);
  });
}

// (O, C/G, kH, kW) to (steps, padded_outputs, kRow), zeros where there is no channel or output.
template <class T>
__global__ void pack_weight_kernel(const Steps steps, const typename T::storage_t* weight, typename T::operand_t* packed,
                                   int padded_outputs, int64_t count) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  const int column = int(i % T::kRow);
  const int o = int(i / T::kRow % padded_outputs);
  const Step step(steps, int(i / T::kRow / padded_outputs));
  packed[i] = weight_operand<T>(steps, step, weight, o, column);
}

// How wide a block is: all outputs of a group if that can be, since each block samples for itself.
constexpr int kNarrow = 64, kMiddle = 128, kWide = 256;
template <class T>
int outputs_of_tile(int64_t group_out_channels) {
  if (sizeof(typename T::acc_t) == 8 || group_out_channels <= kNarrow) return kNarrow;
  if (std::is_same_v<typename T::operand_t, float> || group_out_channels <= kMiddle) return kMiddle;
  return kWide;
}

template <class T>
int64_t padded_outputs(int64_t group_out_channels) {
  return round_up(group_out_channels, outputs_of_tile<T>(group_out_channels));
}

template <class T, class Tile>
cudaError_t launch_tile(const ForwardArguments& a, bool vectors, cudaStream_t stream) {
  const int64_t blocks = ceil_div(a.rows, Tile::kPixels) * a.steps.groups * a.output_tiles;
  const auto kernel = vectors ? forward_kernel<T, true, Tile> : forward_kernel<T, false, Tile>;
  return launch(kernel, blocks, kThreads, ForwardShared<T, Tile>::kBytes, stream, a);
}

template <class T>
cudaError_t run_forward(const DeformCall& call, const void* bias, void* out, void* workspace, cudaStream_t stream) {
  const DeformConv2dParams& p = call.params;
  if (is_direct(p)) return run_direct_forward<typename T::storage_t>(call, bias, out, stream);
  const int outputs = outputs_of_tile<T>(p.group_out_channels());
  const Steps steps(p, T::kRow);
  const int padded = int(padded_outputs<T>(p.group_out_channels()));
  const int64_t count = steps.count() * padded * T::kRow;
  DYNCONV_RETURN_IF_ERROR(launch(pack_weight_kernel<T>, ceil_div(count, kThreads), kThreads, 0, stream, steps,
                                 static_cast<const typename T::storage_t*>(call.weight),
                                 static_cast<typename T::operand_t*>(workspace), padded, count));
  const ForwardArguments a{Geometry(p),
                           steps,
                           call.input,
                           image_strides(p.channels, p.height, p.width, p.channels_last),
                           image_strides(p.out_channels, p.out_height, p.out_width, p.channels_last),
                           call.offset,
                           call.mask,
                           call.offset_type,
                           workspace,
                           bias,
                           out,
                           p.batch * p.out_pixels(),
                           padded / outputs,
                           padded};
  const bool vectors =
      has_vectors(call.input, p.channels_last, p.channels, p.group_channels(), p.channels / p.offset_groups, T::kChunk);
  if constexpr (sizeof(typename T::acc_t) == 8) {
    return launch_tile<T, Tile<64, kNarrow, 2, 4>>(a, vectors, stream);
  } else {
    if (outputs == kNarrow) return launch_tile<T, Tile<128, kNarrow, 4, 2>>(a, vectors, stream);
    if constexpr (!std::is_same_v<typename T::operand_t, float>)
      if (outputs == kWide) return launch_tile<T, Tile<64, kWide, 2, 4>>(a, vectors, stream);
    return launch_tile<T, Tile<128, kMiddle, 2, 4>>(a, vectors, stream);
  }
}

}  // namespace
}  // namespace deform_cuda

int64_t deform_conv2d_forward_workspace(Precision precision, const DeformConv2dParams& p) {
  if (deform_cuda::is_direct(p)) return 0;
  return dispatch_precision(precision, [&](auto types) {
    using T = decltype(types);
    return deform_cuda::Steps(p, T::kRow).count() * deform_cuda::padded_outputs<T>(p.group_out_channels()) * kRowBytes;
  });
}

cudaError_t launch_deform_conv2d_forward(Precision precision, const DeformCall& call, const void* bias, void* out,
                                       void* workspace, cudaStream_t stream) {
  return dispatch_precision(precision, [&](auto types) {
    return deform_cuda::run_forward<decltype(types)>(call, bias, out, workspace, stream);
  });
}

}  // namespace dynconv
