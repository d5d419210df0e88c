// SPDX-License-Identifier: BSD-3-Clause
// Gradients of deform_conv2d with respect to input, offset and mask, and the launcher of the whole backward.
//
// A block keeps the output gradients of a tile of pixels in shared memory and, a tap and a chunk of channels at a time,
// multiplies them with the weight: the gradient of the sampled values, which never reaches global memory. From it follow
// at once four products with the sample's corners (all that the gradients of offset and mask need), and what is added to
// the corners' gradients. The additions have no fixed order; the deterministic way writes the gradients of the sampled
// values of some images to the workspace, and lets each thread of a second kernel own a channel of some rows of an image.
#include "common/cuda/launch.h"
#include "deform_conv2d/deform_conv2d_direct.h"

namespace dynconv {
namespace deform_cuda {
namespace {

constexpr int kPixels = 64;  // of a block

template <class T>
struct DataShared {
  using acc_t = typename T::acc_t;
  static constexpr int kWeight = T::kRow * kRowBytes;                      // a chunk of outputs; two of these
  static constexpr int kStride = T::kRow + 16 / int(sizeof(acc_t));        // of the gradients' rows, in numbers
  static constexpr int kGradients = kPixels * kStride * int(sizeof(acc_t));
  static constexpr int kSamples = kPixels * int(sizeof(Sample<acc_t>));
  static constexpr int kExtras = kPixels * int(sizeof(SampleExtras<acc_t>));
  static constexpr int kDots = kPixels * kRowChunks * 4 * int(sizeof(acc_t));
  static constexpr int kPlaces = kPixels * int(sizeof(Pixel));
  static constexpr int kFixed = 2 * kWeight + kGradients + kSamples + kExtras + kDots + kPlaces;
  // Output gradients that stay in shared memory: at most this many chunks of kRow outputs.
  static constexpr int kMostChunks = 8;
  static __host__ __device__ int resident(int output_chunks) {
    return output_chunks < kMostChunks ? output_chunks : kMostChunks;
  }
};

template <class T, bool vectors>
__global__ void __launch_bounds__(kThreads, 2) backward_data_kernel(const DataArguments a) {
  using storage_t = typename T::storage_t;
  using operand_t = typename T::operand_t;
  using acc_t = typename T::acc_t;
  using Product = dynconv::Product<operand_t, false>;
  using Shared = DataShared<T>;
  constexpr int kRow = T::kRow;
  constexpr int kWarpsN = kRow >= 32 ? 2 : 1, kWarpsM = kThreads / 32 / kWarpsN;
  constexpr int kWarpM = kPixels / kWarpsM, kWarpN = kRow / kWarpsN;
  constexpr int kItems = kPixels * kRowChunks / kThreads;

  const int resident = Shared::resident(a.output_chunks);
  unsigned char* const grads_out = dynamic_shared();  // (resident, kPixels) rows
  unsigned char* const weights = grads_out + resident * kPixels * kRowBytes;
  auto* const gradients = reinterpret_cast<acc_t*>(weights + 2 * Shared::kWeight);
  auto* const samples = reinterpret_cast<Sample<acc_t>*>(reinterpret_cast<unsigned char*>(gradients) + Shared::kGradients);
  auto* const dots = reinterpret_cast<acc_t*>(samples + kPixels);  // (chunk, pixel, corner)
  auto* const extras = reinterpret_cast<SampleExtras<acc_t>*>(dots + kPixels * kRowChunks * 4);
  auto* const pixels = reinterpret_cast<Pixel*>(extras + kPixels);

  const int thread = int(threadIdx.x), warp = thread / 32;
  const int d = int(blockIdx.x % unsigned(a.steps.offset_groups));
  const int64_t first_row = a.first_row + blockIdx.x / unsigned(a.steps.offset_groups) * int64_t(kPixels);
  const int warp_m = warp % kWarpsM * kWarpM, warp_n = warp / kWarpsM * kWarpN;

  const SampleSource<acc_t> source{{a.offset, a.offset_type}, {a.mask, a.offset_type}};
  const Image<storage_t> image{static_cast<const storage_t*>(a.input), a.input_stride};
  const bool wants_dots = a.grad_offset != nullptr || a.grad_mask != nullptr;

  if (thread < kPixels) pixels[thread] = Pixel(a.geometry, first_row + thread, a.rows);
  auto locate = [&](int tap) {
    if (thread < kPixels) samples[thread] = source.sample(a.geometry, pixels[thread], d, tap, &extras[thread]);
  };
  auto copy_weight = [&](const Step& step, int output_chunk, int buffer) {
    const auto* from = static_cast<const unsigned char*>(a.packed_weight) +
                       (int64_t(step.number(a.steps)) * a.output_chunks + output_chunk) * Shared::kWeight;
    unsigned char* const to = weights + buffer * Shared::kWeight;
    for (int i = thread; i < kRow * kRowChunks; i += kThreads)
      copy_async_16(to + chunk_offset(i / kRowChunks, i % kRowChunks), from + i * 16);
    copy_async_commit();
  };
  // Output gradients of weight group g, from chunk `first` on.
  auto load_grads_out = [&](int g, int first) {
    const OutputGradients<T> from{static_cast<const storage_t*>(a.grad_out), a.grad_out_stride,
                                  a.steps.group_out_channels, a.grad_out_vectors};
    for (int c = 0; c < resident && first + c < a.output_chunks; ++c)
      from.template load_tile<kPixels>(pixels, g, (first + c) * kRow, grads_out + c * kPixels * kRowBytes);
  };

  int buffer = 0, loaded_group = -1, loaded_first = 0;
  __syncthreads();
  for (int tap = 0; tap < a.steps.taps; ++tap) {
    // The last tap's samples and extras have been read.
    locate(tap);
    acc_t sums_of_dots[kItems][4] = {};
    Step step(a.steps.first_group(d), d, tap, 0);
    copy_weight(step, 0, buffer);
    for (bool more = true; more;) {
      typename Product::template Sums<kWarpM, kWarpN> sums;
      Step next = step;
      more = next.advance_in_tap(a.steps);
      for (int output_chunk = 0; output_chunk < a.output_chunks; ++output_chunk) {
        const int first = output_chunk / resident * resident;
        if (step.g != loaded_group || first != loaded_first) {
          __syncthreads();
          load_grads_out(step.g, first);
          loaded_group = step.g, loaded_first = first;
        }
        copy_async_wait<0>();
        __syncthreads();
        // The other buffer's product is done.
        if (output_chunk + 1 < a.output_chunks) copy_weight(step, output_chunk + 1, buffer ^ 1);
        else if (more) copy_weight(next, 0, buffer ^ 1);
        DYNCONV_NO_UNROLL
        for (int slice = 0; slice < kSlices; ++slice)
          Product::template add<kWarpM, kWarpN>(sums, grads_out + (output_chunk - first) * kPixels * kRowBytes, warp_m, 0,
                                                weights + buffer * Shared::kWeight, warp_n, 0, slice);
        buffer ^= 1;
      }
      Product::for_each(sums, [&](int m, int n, acc_t sum) {
        gradients[(warp_m + m) * Shared::kStride + warp_n + n] = sum;
      });
      __syncthreads();
      DYNCONV_UNROLL
      for (int item = 0; item < kItems; ++item) {
        const ChunkPlace<vectors, kPixels> place(thread + item * kThreads);
        const Sample<acc_t>& sample = samples[place.row];
        const int channel = step.channel(a.steps) + place.chunk * T::kChunk;
        const int count = chunk_count<T>(step.channels(a.steps), place.chunk);
        const acc_t* const at = gradients + place.row * Shared::kStride + place.chunk * T::kChunk;
        acc_t gradient[T::kChunk];
        DYNCONV_UNROLL
        for (int e = 0; e < T::kChunk; ++e) gradient[e] = at[e];
        if (wants_dots) add_dots<T, vectors>(image, sample, channel, count, gradient, sums_of_dots[item]);
        const acc_t mask = extras[place.row].mask;
        if (a.grad_input != nullptr) {
          DYNCONV_UNROLL
          for (int e = 0; e < T::kChunk; ++e) gradient[e] *= mask;
          scatter<T, vectors>(static_cast<acc_t*>(a.grad_input), a.input_stride, sample, channel, count, gradient);
        }
        if (a.grad_columns != nullptr && pixels[place.row].image >= 0) {
          const int64_t row = first_row + place.row - a.first_row;
          const int64_t channels = int64_t(a.steps.groups) * a.steps.group_channels;
          auto* const to = static_cast<acc_t*>(a.grad_columns) + (row * a.steps.taps + tap) * channels + channel;
          DYNCONV_UNROLL
          for (int e = 0; e < T::kChunk; ++e)
            if (e < count) to[e] = gradient[e] * mask;
        }
      }
      step = next;
    }
    if (wants_dots) {
      DYNCONV_UNROLL
      for (int item = 0; item < kItems; ++item) {
        const ChunkPlace<vectors, kPixels> place(thread + item * kThreads);
        DYNCONV_UNROLL
        for (int i = 0; i < 4; ++i) dots[(place.chunk * kPixels + place.row) * 4 + i] = sums_of_dots[item][i];
      }
    }
    __syncthreads();
    if (wants_dots && thread < kPixels && pixels[thread].image >= 0) {
      acc_t dot[4] = {};
      for (int chunk = 0; chunk < kRowChunks; ++chunk)
        DYNCONV_UNROLL
        for (int i = 0; i < 4; ++i) dot[i] += dots[(chunk * kPixels + thread) * 4 + i];
      write_sample_gradients<acc_t>(a, pixels[thread], d, tap, extras[thread], dot);
    }
  }
}

// (O, C/G, kH, kW) to (steps, output_chunks, kRow channels, kRow outputs), zeros where there is none.
template <class T>
__global__ void pack_weight_transposed_kernel(const Steps steps, const typename T::storage_t* weight,
                                              typename T::operand_t* packed, int output_chunks, int64_t count) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  const int row = int(i / T::kRow % T::kRow);
  const int64_t chunk = i / T::kRow / T::kRow;
  const int o = int(chunk % output_chunks) * T::kRow + int(i % T::kRow);
  const Step step(steps, int(chunk / output_chunks));
  packed[i] = weight_operand<T>(steps, step, weight, o, row);
}

// ---------------------------------------------------------------------------------------- the deterministic way

struct OwnedArguments {
  Geometry geometry;
  const void *offset, *mask;
  StorageType offset_type;
  const void* grad_columns;  // of images first_image on
  void* grad_input;          // sums
  ImageStrides stride;
  int first_image, channels, offset_channels, bands, taps;
};

// Samples that a block looks at together.
constexpr int kOwnedSamples = 64;

// A block owns the rows of one band of an image, and a thread some channels of it: it goes through all samples of the
// image in order and adds those that touch its rows.
template <class T>
__global__ void __launch_bounds__(kThreads) owned_scatter_kernel(const OwnedArguments a) {
  using acc_t = typename T::acc_t;
  auto* const samples = reinterpret_cast<Sample<acc_t>*>(dynamic_shared());
  const int thread = int(threadIdx.x);
  const int band = int(blockIdx.x % unsigned(a.bands));
  const int d = int(blockIdx.x / unsigned(a.bands) % unsigned(a.channels / a.offset_channels));
  const int image = int(blockIdx.x / unsigned(a.bands) / unsigned(a.channels / a.offset_channels));
  const int first = int(int64_t(a.geometry.height) * band / a.bands);
  const int last = int(int64_t(a.geometry.height) * (band + 1) / a.bands);
  const SampleSource<acc_t> source{{a.offset, a.offset_type}, {a.mask, a.offset_type}};
  const int64_t pixels = int64_t(a.geometry.out_height) * a.geometry.out_width;
  auto* const grad_input = static_cast<acc_t*>(a.grad_input) + (a.first_image + image) * a.stride.batch;
  for (int64_t begin = 0; begin < pixels * a.taps; begin += kOwnedSamples) {
    if (thread < kOwnedSamples) {
      const int64_t i = begin + thread;
      Pixel pixel(a.geometry, i / a.taps, pixels);
      if (pixel.image >= 0) pixel.image = a.first_image + image;
      SampleExtras<acc_t> extras;
      samples[thread] = source.sample(a.geometry, pixel, d, int(i % a.taps), &extras);
    }
    __syncthreads();
    for (int s = 0; s < kOwnedSamples && begin + s < pixels * a.taps; ++s) {
      const Sample<acc_t>& sample = samples[s];
      if (sample.corners == 0 || sample.top + 1 < first || sample.top >= last) continue;
      const auto* const gradient = static_cast<const acc_t*>(a.grad_columns) +
                                   (image * pixels * a.taps + begin + s) * a.channels + int64_t(d) * a.offset_channels;
      for (int c = thread; c < a.offset_channels; c += kThreads)
        for (int i = 0; i < 4; ++i) {
          const int y = sample.top + i / 2;
          if ((sample.corners >> i & 1) == 0 || y < first || y >= last) continue;
          const int64_t place = y * a.stride.row + (sample.left + i % 2) * a.stride.pixel;
          grad_input[(int64_t(d) * a.offset_channels + c) * a.stride.channel + place] +=
              sample.weight[i] * gradient[c];
        }
    }
    __syncthreads();
  }
}

// Sums to 16-bit numbers.
template <class T>
__global__ void to_storage_kernel(const typename T::acc_t* from, typename T::storage_t* to, int64_t count) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < count) from_acc(from[i], to + i);
}

// ------------------------------------------------------------------------------------------------------- launchers

// Sums of the input's gradient stand in the gradient itself where the types agree.
template <class T>
constexpr bool kSumsApart = !std::is_same_v<typename T::storage_t, typename T::acc_t>;

// How the workspace of a backward is cut, in bytes.
template <class T>
struct Workspace {
  int64_t packed_weight = 0, grad_input = 0, grad_columns = 0, weight = 0, total = 0;
  int64_t images;  // whose columns fit

  explicit Workspace(const DeformBackwardCall& call) {
    const DeformConv2dParams& p = call.forward.params;
    const Steps steps(p, T::kRow);
    const DeformGradients& g = call.gradients;
    images = p.batch;
    if (g.input != nullptr || g.offset != nullptr || g.mask != nullptr) {
      if (!is_direct(p))
        packed_weight = steps.count() * ceil_div(p.group_out_channels(), T::kRow) * T::kRow * kRowBytes;
      if (g.input != nullptr && kSumsApart<T>)
        grad_input = p.batch * p.channels * p.in_pixels() * int64_t(sizeof(typename T::acc_t));
      if (g.input != nullptr && call.deterministic) {
        const int64_t image = p.out_pixels() * p.taps() * p.channels * int64_t(sizeof(typename T::acc_t));
        const int64_t fit = kColumnBytes / image;
        images = fit < 1 ? 1 : fit < p.batch ? fit : p.batch;
        grad_columns = images * image;
      }
    }
    weight = weight_workspace<T>(call);
    for (int64_t* part : {&packed_weight, &grad_input, &grad_columns, &weight}) {
      *part = round_up(*part, kWorkspaceAlignment);
      total += *part;
    }
  }

 private:
  static constexpr int64_t kColumnBytes = 64 * 1024 * 1024;
};

template <class T, bool vectors>
cudaError_t launch_data(const DataArguments& a, cudaStream_t stream) {
  using Shared = DataShared<T>;
  const int resident = Shared::resident(a.output_chunks);
  return launch(backward_data_kernel<T, vectors>, ceil_div(a.rows - a.first_row, kPixels) * a.steps.offset_groups,
                kThreads, size_t(Shared::kFixed + resident * kPixels * kRowBytes), stream, a);
}

template <class T>
cudaError_t run_backward(const DeformBackwardCall& call, void* workspace, cudaStream_t stream) {
  using storage_t = typename T::storage_t;
  using acc_t = typename T::acc_t;
  const DeformConv2dParams& p = call.forward.params;
  const DeformGradients& g = call.gradients;
  const Workspace<T> cut(call);
  auto* const base = static_cast<unsigned char*>(workspace);
  if (g.input != nullptr || g.offset != nullptr || g.mask != nullptr) {
    const Steps steps(p, T::kRow);
    const int output_chunks = int(ceil_div(p.group_out_channels(), T::kRow));
    const int64_t count = steps.count() * output_chunks * T::kRow * T::kRow;
    auto* const packed = reinterpret_cast<typename T::operand_t*>(base);
    const bool direct = is_direct(p);
    if (!direct)
      DYNCONV_RETURN_IF_ERROR(launch(pack_weight_transposed_kernel<T>, ceil_div(count, kThreads), kThreads, 0, stream,
                                     steps, static_cast<const storage_t*>(call.forward.weight), packed, output_chunks,
                                     count));
    const int64_t input_count = p.batch * p.channels * p.in_pixels();
    void* const sums = kSumsApart<T> ? base + cut.packed_weight : g.input;
    if (g.input != nullptr) DYNCONV_RETURN_IF_ERROR(cudaMemsetAsync(sums, 0, size_t(input_count) * sizeof(acc_t), stream));
    const bool owned = call.deterministic && g.input != nullptr;
    void* const columns = owned ? base + cut.packed_weight + cut.grad_input : nullptr;
    const bool vectors = has_vectors(call.forward.input, p.channels_last, p.channels, p.group_channels(),
                                     p.channels / p.offset_groups, T::kChunk);
    DataArguments a{Geometry(p),
                    steps,
                    call.forward.input,
                    image_strides(p.channels, p.height, p.width, p.channels_last),
                    image_strides(p.out_channels, p.out_height, p.out_width, call.grad_out_channels_last),
                    call.forward.offset,
                    call.forward.mask,
                    call.forward.offset_type,
                    call.grad_out,
                    packed,
                    output_chunks,
                    has_output_vectors<T>(call),
                    owned ? nullptr : sums,
                    columns,
                    g.offset,
                    g.mask,
                    0,
                    0};
    if (g.input == nullptr) a.grad_input = nullptr;
    for (int64_t image = 0; image < p.batch; image += cut.images) {
      const int64_t end = image + cut.images < p.batch ? image + cut.images : p.batch;
      a.first_row = image * p.out_pixels();
      a.rows = end * p.out_pixels();
      if (direct) DYNCONV_RETURN_IF_ERROR(run_direct_data<storage_t>(p, a, call.forward.weight, stream));
      else if (vectors) DYNCONV_RETURN_IF_ERROR((launch_data<T, true>(a, stream)));
      else DYNCONV_RETURN_IF_ERROR((launch_data<T, false>(a, stream)));
      if (!owned) continue;
      const int bands = int(p.height < 8 ? p.height : 8);
      const OwnedArguments o{a.geometry, a.offset, a.mask, a.offset_type, columns, sums, a.input_stride, int(image),
                             int(p.channels), steps.offset_channels, bands, steps.taps};
      DYNCONV_RETURN_IF_ERROR(launch(owned_scatter_kernel<T>, (end - image) * p.offset_groups * bands, kThreads,
                                     kOwnedSamples * sizeof(Sample<acc_t>), stream, o));
    }
    if constexpr (kSumsApart<T>)
      if (g.input != nullptr)
        DYNCONV_RETURN_IF_ERROR(launch(to_storage_kernel<T>, ceil_div(input_count, kThreads), kThreads, 0, stream,
                                       static_cast<const acc_t*>(sums), static_cast<storage_t*>(g.input), input_count));
  }
  return run_backward_weight<T>(call, base + cut.packed_weight + cut.grad_input + cut.grad_columns, stream);
}

}  // namespace
}  // namespace deform_cuda

int64_t deform_conv2d_backward_workspace(Precision precision, const DeformBackwardCall& call) {
  return dispatch_precision(
      precision, [&](auto types) { return deform_cuda::Workspace<decltype(types)>(call).total; });
}

cudaError_t launch_deform_conv2d_backward(Precision precision, const DeformBackwardCall& call, void* workspace,
                                        cudaStream_t stream) {
  return dispatch_precision(
      precision, [&](auto types) { return deform_cuda::run_backward<decltype(types)>(call, workspace, stream); });
}

}  // namespace dynconv
