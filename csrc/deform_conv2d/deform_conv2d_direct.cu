// SPDX-License-Identifier: BSD-3-Clause
// deform_conv2d for small weight groups, forward and backward, without tiles: a thread has one pixel and some groups.
//
// The threads of a block stand pixels x columns: lanes run along whichever is fastest in memory, and a column has
// kSums / kOutputs groups, one every `columns` groups, with kOutputs (at least O / G) sums each. Where taps sample is found
// once a (pixel, tap, offset group) and read from shared memory by all columns, as are the weights.
#include "common/cuda/launch.h"
#include "common/cuda/shares.h"
#include "deform_conv2d/deform_conv2d_direct.h"

namespace dynconv {
namespace deform_cuda {
namespace {

// Sums of a thread, of outputs or of weights.
constexpr int kSums = 8;
template <class storage_t>
using acc_of = std::conditional_t<sizeof(storage_t) == 8, double, float>;
// Blocks of a multiprocessor: with registers for all corners of a thread's channels to be fetched together.
template <class storage_t>
constexpr int kBlocks = sizeof(storage_t) == 8 ? 1 : 2;

// Groups and channels, and how the threads stand.
struct DirectShape {
  int groups, group_channels, group_out_channels, offset_groups, offset_channels;
  int pixels, columns;      // powers of two, of these bits; together kThreads
  int pixel_bits, column_bits;
  bool channels_fastest;    // lanes run along columns, else along pixels
  bool crossing;            // a group's channels may belong to several offset groups
  int slabs;                // of an offset group's groups, or of all where they cross
  int slab_groups;          // columns x groups of a column
  int taps_at_once;         // whose samples and weights are in shared memory together

  // outputs: kOutputs. one_group: where groups cross, a slab is one group.
  DirectShape(const DeformConv2dParams& p, int outputs, bool one_group)
      : groups(int(p.groups)),
        group_channels(int(p.group_channels())),
        group_out_channels(int(p.group_out_channels())),
        offset_groups(int(p.offset_groups)),
        offset_channels(int(p.channels / p.offset_groups)),
        channels_fastest(p.channels_last),
        crossing(offset_channels % group_channels != 0),
        taps_at_once(int(p.taps())) {
    constexpr int thread_bits = 8;
    static_assert(kThreads == 1 << thread_bits);
    const int column_groups = kSums / outputs;
    const int together = crossing ? 1 : offset_channels / group_channels;
    const int most = channels_fastest ? 32 : kThreads / 32;
    for (column_bits = 0; 1 << column_bits < most && (column_groups << column_bits) < together;) ++column_bits;
    pixel_bits = thread_bits - column_bits;
    columns = 1 << column_bits, pixels = 1 << pixel_bits;
    slab_groups = crossing && one_group ? 1 : columns * column_groups;
    slabs = int(ceil_div(crossing ? groups : together, slab_groups));
  }
  void fit(int fixed_bytes, int bytes_of_tap) {
    const int most = (kSharedBytes - fixed_bytes) / bytes_of_tap;
    if (taps_at_once > most) taps_at_once = most < 1 ? 1 : most;
  }
  int64_t all_slabs() const { return crossing ? slabs : int64_t(slabs) * offset_groups; }

  DYNCONV_DEVICE int pixel() const { return int(threadIdx.x) >> (channels_fastest ? column_bits : 0) & (pixels - 1); }
  DYNCONV_DEVICE int column() const { return int(threadIdx.x) >> (channels_fastest ? 0 : pixel_bits) & (columns - 1); }
  // The groups of a slab: [first, end).
  DYNCONV_DEVICE int first_group(int slab) const {
    if (crossing) return slab * slab_groups;
    return slab / slabs * (offset_channels / group_channels) + slab % slabs * slab_groups;
  }
  DYNCONV_DEVICE int end_group(int slab) const {
    const int end = first_group(slab) + slab_groups;
    const int most = crossing ? groups : (slab / slabs + 1) * (offset_channels / group_channels);
    return end < most ? end : most;
  }
  // The channels of group g in offset group d, counted in the group: [begin, end).
  DYNCONV_DEVICE int begin(int g, int d) const {
    const int at = d * offset_channels - g * group_channels;
    return crossing && at > 0 ? at : 0;
  }
  DYNCONV_DEVICE int end(int g, int d) const {
    const int at = (d + 1) * offset_channels - g * group_channels;
    return crossing && at < group_channels ? at : group_channels;
  }

 private:
  static constexpr int kSharedBytes = 56 * 1024;
};

// ------------------------------------------------------------------------------------------------- pieces of kernels

// The weights of a slab at some taps, in shared memory: (tap, channel of the group, sum, column); 0 where there is none.
template <class storage_t>
DYNCONV_DEVICE void load_weights(const DirectShape& s, const storage_t* weight, int first_group, int end_group,
                                 int outputs, int all_taps, int first_tap, int taps, acc_of<storage_t>* to) {
  const int count = taps * s.group_channels * kSums * s.columns;
  for (int i = int(threadIdx.x); i < count; i += kThreads) {
    const int column = i & (s.columns - 1), sum = (i >> s.column_bits) % kSums, rest = (i >> s.column_bits) / kSums;
    const int chunk_tap = rest / s.group_channels, c = rest - chunk_tap * s.group_channels, tap = first_tap + chunk_tap;
    const int g = first_group + sum / outputs * s.columns + column, o = sum % outputs;
    acc_of<storage_t> value = 0;
    if (g < end_group && o < s.group_out_channels)
      value = to_acc(weight[((int64_t(g) * s.group_out_channels + o) * s.group_channels + c) * all_taps + tap]);
    to[i] = value;
  }
}

// A sample as the kernels read it from shared memory.
template <class acc_t>
struct alignas(16) Corners {
  int64_t offset;  // of corner 0 at channel 0, in elements
  int inside;      // Sample's corners
  acc_t weight[4];

  DYNCONV_DEVICE Corners(const Sample<acc_t>& s, const ImageStrides& stride)
      : offset(s.corners ? s.image * stride.batch + s.top * stride.row + s.left * stride.pixel : 0), inside(s.corners) {
    DYNCONV_UNROLL
    for (int i = 0; i < 4; ++i) weight[i] = s.weight[i];
  }
};

// The corners of a sample in an image, at channel 0.
template <class number_t>
struct CornerPointers {
  number_t* at[4];

  template <class acc_t>
  DYNCONV_DEVICE CornerPointers(number_t* data, const ImageStrides& stride, const Corners<acc_t>& corners) {
    DYNCONV_UNROLL
    for (int i = 0; i < 4; ++i) at[i] = data + corners.offset + corner_offset(stride, i);
  }
  // Steps rather than products: those would be kept in registers.
  DYNCONV_DEVICE void advance(int64_t step) {
    DYNCONV_UNROLL
    for (int i = 0; i < 4; ++i) at[i] += step;
  }
};

// The numbers at a sample's corners, `channel` elements on; 0 outside.
template <class storage_t>
DYNCONV_DEVICE void load_corners(const CornerPointers<const storage_t>& from, int64_t channel, int inside,
                                 acc_of<storage_t> (&v)[4]) {
  DYNCONV_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[i] = 0;
    if (inside >> i & 1) v[i] = to_acc(from.at[i][channel]);
  }
}

// ----------------------------------------------------------------------------------------------------------- forward

struct ForwardArguments {
  Geometry geometry;
  DirectShape shape;
  const void* input;
  ImageStrides input_stride, out_stride;
  const void *offset, *mask;
  StorageType offset_type;
  const void *weight, *bias;
  void* out;
  int64_t rows;
};

template <class acc_t>
struct ForwardBytes {
  static int fixed(const DirectShape& s) { return s.pixels * int(sizeof(Pixel)); }
  static int of_tap(const DirectShape& s) {
    return s.pixels * int(sizeof(Corners<acc_t>)) + s.group_channels * kSums * s.columns * int(sizeof(acc_t));
  }
};

// kOutputs 1 means one channel, too: depthwise.
template <class storage_t, int kOutputs>
__global__ void __launch_bounds__(kThreads, kBlocks<storage_t>) direct_forward_kernel(const ForwardArguments a) {
  using acc_t = acc_of<storage_t>;
  constexpr int kGroups = kSums / kOutputs;
  const DirectShape& s = a.shape;
  auto* const samples = reinterpret_cast<Corners<acc_t>*>(dynamic_shared());  // (tap, pixel)
  auto* const weights = reinterpret_cast<acc_t*>(samples + s.taps_at_once * s.pixels);
  auto* const pixels = reinterpret_cast<Pixel*>(weights + s.taps_at_once * s.group_channels * kSums * s.columns);
  const int thread = int(threadIdx.x), pixel = s.pixel(), column = s.column();
  const int all_slabs = s.crossing ? s.slabs : s.slabs * s.offset_groups;
  const int slab = int(blockIdx.x % unsigned(all_slabs));
  const int64_t first_row = blockIdx.x / unsigned(all_slabs) * int64_t(s.pixels);
  const int first_group = s.first_group(slab), end_group = s.end_group(slab);
  const SampleSource<acc_t> source{{a.offset, a.offset_type}, {a.mask, a.offset_type}};
  // The thread's groups: first_group + u * columns + column, u < own_groups.
  const int own_groups = (end_group - first_group - column + s.columns - 1) >> s.column_bits;
  const int64_t group_step = int64_t(s.columns) * s.group_channels * a.input_stride.channel;
  const auto* const input = static_cast<const storage_t*>(a.input) +
                            int64_t(first_group + column) * s.group_channels * a.input_stride.channel;
  if (thread < s.pixels) pixels[thread] = Pixel(a.geometry, first_row + thread, a.rows);

  acc_t sums[kSums] = {};
  const int last_d = (end_group * s.group_channels - 1) / s.offset_channels;
  for (int d = first_group * s.group_channels / s.offset_channels; d <= last_d; ++d) {
    for (int first_tap = 0; first_tap < a.geometry.taps; first_tap += s.taps_at_once) {
      const int taps = min(s.taps_at_once, a.geometry.taps - first_tap);
      __syncthreads();
      for (int i = thread; i < taps * s.pixels; i += kThreads)
        samples[i] = {source.modulated_sample(a.geometry, pixels[i & (s.pixels - 1)], d, first_tap + (i >> s.pixel_bits)),
                      a.input_stride};
      load_weights(s, static_cast<const storage_t*>(a.weight), first_group, end_group, kOutputs, a.geometry.taps,
                   first_tap, taps, weights);
      __syncthreads();
      DYNCONV_NO_UNROLL
      for (int tap = 0; tap < taps; ++tap) {
        const Corners<acc_t> sample = samples[tap * s.pixels + pixel];
        CornerPointers<const storage_t> corners(input, a.input_stride, sample);
        const acc_t* const tap_weights = weights + tap * s.group_channels * kSums * s.columns + column;
        auto add = [&](int u, int c) {
          acc_t v[4], value = 0;
          load_corners(corners, c * a.input_stride.channel, sample.inside, v);
          DYNCONV_UNROLL
          for (int i = 0; i < 4; ++i) value += sample.weight[i] * v[i];
          DYNCONV_UNROLL
          for (int o = 0; o < kOutputs; ++o)
            sums[u * kOutputs + o] += tap_weights[(c * kSums + u * kOutputs + o) * s.columns] * value;
        };
        // Without questions in between, all loads are under way together.
        if (kOutputs == 1 && own_groups == kGroups) {
          DYNCONV_UNROLL
          for (int u = 0; u < kGroups; ++u, corners.advance(group_step)) add(u, 0);
        } else {
          DYNCONV_UNROLL
          for (int u = 0; u < kGroups; ++u, corners.advance(group_step)) {
            if (u >= own_groups) continue;
            const int g = first_group + u * s.columns + column;
            const int begin = kOutputs == 1 ? 0 : s.begin(g, d), end = kOutputs == 1 ? 1 : s.end(g, d);
            for (int c = begin; c < end; ++c) add(u, c);
          }
        }
      }
    }
  }

  const Pixel place = pixels[pixel];
  if (place.image < 0) return;
  auto* const out = static_cast<storage_t*>(a.out) + place.image * a.out_stride.batch + place.y * a.out_stride.row +
                    place.x * a.out_stride.pixel;
  const auto* const bias = static_cast<const storage_t*>(a.bias);
  DYNCONV_UNROLL
  for (int i = 0; i < kSums; ++i) {
    const int g = first_group + i / kOutputs * s.columns + column, o = i % kOutputs;
    if (g >= end_group || o >= s.group_out_channels) continue;
    const int64_t channel = int64_t(g) * s.group_out_channels + o;
    acc_t sum = sums[i];
    if (bias != nullptr) sum += to_acc(bias[channel]);
    from_acc(sum, out + channel * a.out_stride.channel);
  }
}

// ------------------------------------------------------------------------------------ gradients of input, offset, mask

template <class acc_t>
struct DataBytes {
  // Sums of dots that wait for each other: lanes along columns add theirs up themselves.
  static __host__ __device__ int slots(const DirectShape& s) { return s.channels_fastest ? 1 : s.columns; }
  static int fixed(const DirectShape& s) { return s.pixels * int(sizeof(Pixel)); }
  static int of_tap(const DirectShape& s) {
    return s.pixels * (int(sizeof(Corners<acc_t>)) + int(sizeof(SampleExtras<acc_t>)) + slots(s) * 4 * int(sizeof(acc_t))) +
           s.group_channels * kSums * s.columns * int(sizeof(acc_t));
  }
};

// A block has some pixels and one offset group, and goes through the slabs of groups that meet it.
template <class storage_t, int kOutputs>
__global__ void __launch_bounds__(kThreads, kBlocks<storage_t>)
    direct_data_kernel(const DataArguments a, const DirectShape s, const storage_t* weight) {
  using acc_t = acc_of<storage_t>;
  constexpr int kGroups = kSums / kOutputs;
  const int slots = DataBytes<acc_t>::slots(s), places = s.taps_at_once * s.pixels;
  auto* const samples = reinterpret_cast<Corners<acc_t>*>(dynamic_shared());  // (tap, pixel)
  auto* const dots = reinterpret_cast<acc_t*>(samples + places);             // (slot, tap, pixel, corner)
  auto* const weights = dots + slots * places * 4;
  auto* const extras =
      reinterpret_cast<SampleExtras<acc_t>*>(weights + s.taps_at_once * s.group_channels * kSums * s.columns);
  auto* const pixels = reinterpret_cast<Pixel*>(extras + places);
  const int thread = int(threadIdx.x), pixel = s.pixel(), column = s.column();
  const int d = int(blockIdx.x % unsigned(s.offset_groups));
  const int64_t first_row = a.first_row + blockIdx.x / unsigned(s.offset_groups) * int64_t(s.pixels);
  const int first = d * s.offset_channels / s.group_channels;
  const int last = ((d + 1) * s.offset_channels - 1) / s.group_channels;
  const SampleSource<acc_t> source{{a.offset, a.offset_type}, {a.mask, a.offset_type}};
  const auto* const input = static_cast<const storage_t*>(a.input);
  // Addresses are counted from something that is there, in global memory, even if nothing is added.
  auto* const sums = static_cast<acc_t*>(a.grad_input != nullptr ? a.grad_input : const_cast<void*>(a.grad_out));
  const int64_t group_step = int64_t(s.columns) * s.group_channels * a.input_stride.channel;
  const bool wants_dots = a.grad_offset != nullptr || a.grad_mask != nullptr;
  if (thread < s.pixels) pixels[thread] = Pixel(a.geometry, first_row + thread, a.rows);
  __syncthreads();
  const Pixel place = pixels[pixel];

  for (int first_tap = 0; first_tap < a.geometry.taps; first_tap += s.taps_at_once) {
    const int taps = min(s.taps_at_once, a.geometry.taps - first_tap);
    // The chunk of taps before has been read.
    for (int i = thread; i < taps * s.pixels; i += kThreads)
      samples[i] = {
          source.sample(a.geometry, pixels[i & (s.pixels - 1)], d, first_tap + (i >> s.pixel_bits), &extras[i]),
          a.input_stride};
    for (int i = thread; i < slots * places * 4; i += kThreads) dots[i] = 0;
    for (int first_group = first; first_group <= last; first_group += s.columns * kGroups) {
      const int end_group = min(first_group + s.columns * kGroups, last + 1);
      const int own_groups = (end_group - first_group - column + s.columns - 1) >> s.column_bits;
      load_weights(s, weight, first_group, end_group, kOutputs, a.geometry.taps, first_tap, taps, weights);
      acc_t grad_out[kSums];
      DYNCONV_UNROLL
      for (int i = 0; i < kSums; ++i) {
        const int g = first_group + i / kOutputs * s.columns + column, o = i % kOutputs;
        grad_out[i] = 0;
        if (place.image >= 0 && g < end_group && o < s.group_out_channels)
          grad_out[i] = to_acc(static_cast<const storage_t*>(
              a.grad_out)[place.image * a.grad_out_stride.batch + place.y * a.grad_out_stride.row +
                          place.x * a.grad_out_stride.pixel +
                          (int64_t(g) * s.group_out_channels + o) * a.grad_out_stride.channel]);
      }
      __syncthreads();
      DYNCONV_NO_UNROLL
      for (int tap = 0; tap < taps; ++tap) {
        const Corners<acc_t> sample = samples[tap * s.pixels + pixel];
        const acc_t mask = extras[tap * s.pixels + pixel].mask;
        const int64_t first_channel = int64_t(first_group + column) * s.group_channels;
        CornerPointers<const storage_t> corners(input + first_channel * a.input_stride.channel, a.input_stride, sample);
        CornerPointers<acc_t> targets(sums + first_channel * a.input_stride.channel, a.input_stride, sample);
        const acc_t* const tap_weights = weights + tap * s.group_channels * kSums * s.columns + column;
        const int adds = a.grad_input != nullptr ? sample.inside : 0;
        acc_t dot[4] = {};
        DYNCONV_UNROLL
        for (int u = 0; u < kGroups; ++u, corners.advance(group_step), targets.advance(group_step)) {
          if (u >= own_groups) continue;
          const int g = first_group + u * s.columns + column;
          const int begin = kOutputs == 1 ? 0 : s.begin(g, d), end = kOutputs == 1 ? 1 : s.end(g, d);
          for (int c = begin; c < end; ++c) {
            acc_t gradient = 0;
            DYNCONV_UNROLL
            for (int o = 0; o < kOutputs; ++o)
              gradient += tap_weights[(c * kSums + u * kOutputs + o) * s.columns] * grad_out[u * kOutputs + o];
            const int64_t channel = c * a.input_stride.channel;
            if (wants_dots) {
              acc_t v[4];
              load_corners(corners, channel, sample.inside, v);
              DYNCONV_UNROLL
              for (int i = 0; i < 4; ++i) dot[i] += gradient * v[i];
            }
            gradient *= mask;
            DYNCONV_UNROLL
            for (int i = 0; i < 4; ++i)
              if (adds >> i & 1) add_global(targets.at[i] + channel, sample.weight[i] * gradient);
            if (a.grad_columns != nullptr && place.image >= 0) {
              const int64_t row = first_row + pixel - a.first_row, channels = int64_t(s.groups) * s.group_channels;
              static_cast<acc_t*>(a.grad_columns)[(row * a.geometry.taps + first_tap + tap) * channels +
                                                  g * s.group_channels + c] = gradient;
            }
          }
        }
        if (!wants_dots) continue;
        if (s.channels_fastest)
          for (int step = s.columns / 2; step > 0; step /= 2)
            DYNCONV_UNROLL
            for (int i = 0; i < 4; ++i) dot[i] += __shfl_xor_sync(0xffffffffu, dot[i], step);
        if (s.channels_fastest && column != 0) continue;
        // Nobody else's until the barrier.
        acc_t* const to = dots + (((s.channels_fastest ? 0 : column) * s.taps_at_once + tap) * s.pixels + pixel) * 4;
        DYNCONV_UNROLL
        for (int i = 0; i < 4; ++i) to[i] += dot[i];
      }
      __syncthreads();
    }
    if (!wants_dots) continue;
    for (int i = thread; i < taps * s.pixels; i += kThreads) {
      const Pixel at = pixels[i & (s.pixels - 1)];
      if (at.image < 0) continue;
      acc_t dot[4] = {};
      for (int slot = 0; slot < slots; ++slot)
        DYNCONV_UNROLL
        for (int c = 0; c < 4; ++c) dot[c] += dots[(slot * places + i) * 4 + c];
      write_sample_gradients<acc_t>(a, at, d, first_tap + (i >> s.pixel_bits), extras[i], dot);
    }
    __syncthreads();
  }
}

// ----------------------------------------------------------------------------------------------- gradient of the weight

struct WeightArguments {
  Geometry geometry;
  DirectShape shape;
  const void* input;
  ImageStrides input_stride, grad_out_stride;
  const void *offset, *mask;
  StorageType offset_type;
  const void* grad_out;
  void* sums;  // (shares, O, C / G, kH, kW)
  int64_t rows, rows_of_share, count;
};

// A pixel of the block: where its output gradients are; -1 beyond the share.
template <class acc_t>
constexpr int kWeightBytes = kThreads * int(sizeof(Corners<acc_t>) + sizeof(int64_t));

// A block has a slab of groups, a channel of each, a tap, and a share of all pixels; its threads' sums are added at the end.
template <class storage_t, int kOutputs>
__global__ void __launch_bounds__(kThreads, kBlocks<storage_t>) direct_weight_kernel(const WeightArguments a) {
  using acc_t = acc_of<storage_t>;
  constexpr int kGroups = kSums / kOutputs;
  const DirectShape& s = a.shape;
  auto* const samples = reinterpret_cast<Corners<acc_t>*>(dynamic_shared());
  auto* const places = reinterpret_cast<int64_t*>(samples + kThreads);
  const int thread = int(threadIdx.x), pixel = s.pixel(), column = s.column();
  const int all_slabs = s.crossing ? s.slabs : s.slabs * s.offset_groups;
  unsigned rest = blockIdx.x;
  const int slab = int(rest % unsigned(all_slabs));
  rest /= unsigned(all_slabs);
  const int c = int(rest % unsigned(s.group_channels));
  rest /= unsigned(s.group_channels);
  const int tap = int(rest % unsigned(a.geometry.taps));
  const int64_t share = rest / unsigned(a.geometry.taps);
  const int first_group = s.first_group(slab), end_group = s.end_group(slab);
  const int d = (first_group * s.group_channels + c) / s.offset_channels;
  const int64_t end_row = min(a.rows, (share + 1) * a.rows_of_share);
  const SampleSource<acc_t> source{{a.offset, a.offset_type}, {a.mask, a.offset_type}};
  const int own_groups = (end_group - first_group - column + s.columns - 1) >> s.column_bits;
  const int64_t group_step = int64_t(s.columns) * s.group_channels * a.input_stride.channel;
  const int64_t output_step = int64_t(s.columns) * s.group_out_channels * a.grad_out_stride.channel;
  const auto* const input = static_cast<const storage_t*>(a.input) +
                            (int64_t(first_group + column) * s.group_channels + c) * a.input_stride.channel;
  const auto* const grad_out = static_cast<const storage_t*>(a.grad_out) +
                               int64_t(first_group + column) * s.group_out_channels * a.grad_out_stride.channel;

  acc_t sums[kSums] = {};
  for (int64_t row = share * a.rows_of_share; row < end_row; row += kThreads) {
    const Pixel located(a.geometry, row + thread, end_row);
    samples[thread] = {source.modulated_sample(a.geometry, located, d, tap), a.input_stride};
    places[thread] = located.image < 0 ? -1
                                       : located.image * a.grad_out_stride.batch + located.y * a.grad_out_stride.row +
                                             located.x * a.grad_out_stride.pixel;
    __syncthreads();
    DYNCONV_NO_UNROLL
    for (int i = pixel; i < kThreads; i += s.pixels) {
      const Corners<acc_t> sample = samples[i];
      if (places[i] < 0) continue;
      CornerPointers<const storage_t> corners(input, a.input_stride, sample);
      const storage_t* gradients = grad_out + places[i];
      auto add = [&](int u) {
        acc_t v[4], value = 0;
        load_corners(corners, 0, sample.inside, v);
        DYNCONV_UNROLL
        for (int e = 0; e < 4; ++e) value += sample.weight[e] * v[e];
        DYNCONV_UNROLL
        for (int o = 0; o < kOutputs; ++o)
          if (o < s.group_out_channels)
            sums[u * kOutputs + o] += value * to_acc(gradients[o * a.grad_out_stride.channel]);
        corners.advance(group_step);
        gradients += output_step;
      };
      if (kOutputs == 1 && own_groups == kGroups) {
        DYNCONV_UNROLL
        for (int u = 0; u < kGroups; ++u) add(u);
      } else {
        DYNCONV_UNROLL
        for (int u = 0; u < kGroups; ++u)
          if (u < own_groups) add(u);
      }
    }
    __syncthreads();
  }

  // Lanes of a column, then warps, in order.
  auto* const parts = reinterpret_cast<acc_t*>(samples);  // (warp, column of the warp, sum)
  const int lane = thread % 32, warp = thread / 32;
  const int warp_columns = s.channels_fastest ? s.columns : 1;
  DYNCONV_UNROLL
  for (int i = 0; i < kSums; ++i) {
    for (int step = warp_columns; step < 32; step *= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], step);
    if (lane < warp_columns) parts[(warp * warp_columns + lane) * kSums + i] = sums[i];
  }
  __syncthreads();
  const int warps = s.channels_fastest ? kThreads / 32 : s.pixels / 32;  // of a column
  for (int i = thread; i < s.columns * kSums; i += kThreads) {
    const int at = i / kSums, sum_number = i % kSums;
    const int g = first_group + sum_number / kOutputs * s.columns + at, o = sum_number % kOutputs;
    if (g >= end_group || o >= s.group_out_channels) continue;
    acc_t sum = 0;
    for (int w = 0; w < warps; ++w)
      sum += parts[(s.channels_fastest ? w * s.columns + at : at * warps + w) * kSums + sum_number];
    static_cast<acc_t*>(
        a.sums)[share * a.count +
                ((int64_t(g) * s.group_out_channels + o) * s.group_channels + c) * a.geometry.taps + tap] = sum;
  }
}

// ------------------------------------------------------------------------------------------------------- launchers

// Calls f with kOutputs.
template <class F>
auto dispatch_outputs(const DeformConv2dParams& p, F f) {
  if (p.group_out_channels() == 1 && p.group_channels() == 1) return f(std::integral_constant<int, 1>());
  if (p.group_out_channels() <= 2) return f(std::integral_constant<int, 2>());
  if (p.group_out_channels() <= 4) return f(std::integral_constant<int, 4>());
  return f(std::integral_constant<int, 8>());
}

// The pixels are shared out so that there are blocks enough for the device, but no share below some pixels. A function of
// sizes and device alone, so that results are the same each time.
struct WeightShares {
  int64_t rows, rows_of_share, count;

  WeightShares(const DeformConv2dParams& p, const DirectShape& s) : rows(p.batch * p.out_pixels()) {
    const int64_t others = s.all_slabs() * s.group_channels * p.taps();
    int64_t shares = ceil_div(int64_t(multiprocessors()) * 8, others);
    const int64_t most = ceil_div(rows, 4 * kThreads);
    if (shares > most) shares = most;
    rows_of_share = round_up(ceil_div(rows, shares), kThreads);
    count = ceil_div(rows, rows_of_share);
  }
};

}  // namespace

template <class storage_t>
cudaError_t run_direct_forward(const DeformCall& call, const void* bias, void* out, cudaStream_t stream) {
  using Bytes = ForwardBytes<acc_of<storage_t>>;
  const DeformConv2dParams& p = call.params;
  return dispatch_outputs(p, [&](auto outputs) {
    DirectShape shape(p, outputs, false);
    shape.fit(Bytes::fixed(shape), Bytes::of_tap(shape));
    const ForwardArguments a{Geometry(p),
                             shape,
                             call.input,
                             image_strides(p.channels, p.height, p.width, p.channels_last),
                             image_strides(p.out_channels, p.out_height, p.out_width, p.channels_last),
                             call.offset,
                             call.mask,
                             call.offset_type,
                             call.weight,
                             bias,
                             out,
                             p.batch * p.out_pixels()};
    return launch(direct_forward_kernel<storage_t, outputs>, ceil_div(a.rows, shape.pixels) * shape.all_slabs(), kThreads,
                  size_t(Bytes::fixed(shape) + shape.taps_at_once * Bytes::of_tap(shape)), stream, a);
  });
}

template <class storage_t>
cudaError_t run_direct_data(const DeformConv2dParams& p, const DataArguments& a, const void* weight,
                            cudaStream_t stream) {
  using Bytes = DataBytes<acc_of<storage_t>>;
  return dispatch_outputs(p, [&](auto outputs) {
    DirectShape shape(p, outputs, false);
    shape.fit(Bytes::fixed(shape), Bytes::of_tap(shape));
    return launch(direct_data_kernel<storage_t, outputs>, ceil_div(a.rows - a.first_row, shape.pixels) * p.offset_groups,
                  kThreads, size_t(Bytes::fixed(shape) + shape.taps_at_once * Bytes::of_tap(shape)), stream, a, shape,
                  static_cast<const storage_t*>(weight));
  });
}

template <class storage_t>
int64_t direct_weight_workspace(const DeformConv2dParams& p) {
  return dispatch_outputs(p, [&](auto outputs) {
    const WeightShares shares(p, DirectShape(p, outputs, true));
    const int64_t count = p.out_channels * p.group_channels() * p.taps();
    return round_up(shares.count * count * int64_t(sizeof(acc_of<storage_t>)), kWorkspaceAlignment);
  });
}

template <class storage_t>
cudaError_t run_direct_weight(const DeformBackwardCall& call, void* workspace, cudaStream_t stream) {
  using acc_t = acc_of<storage_t>;
  const DeformConv2dParams& p = call.forward.params;
  return dispatch_outputs(p, [&](auto outputs) {
    const DirectShape shape(p, outputs, true);
    const WeightShares shares(p, shape);
    const int64_t count = p.out_channels * p.group_channels() * p.taps();
    const WeightArguments a{Geometry(p),
                            shape,
                            call.forward.input,
                            image_strides(p.channels, p.height, p.width, p.channels_last),
                            image_strides(p.out_channels, p.out_height, p.out_width, call.grad_out_channels_last),
                            call.forward.offset,
                            call.forward.mask,
                            call.forward.offset_type,
                            call.grad_out,
                            workspace,
                            shares.rows,
                            shares.rows_of_share,
                            count};
    const int64_t blocks = shares.count * shape.all_slabs() * shape.group_channels * p.taps();
    DYNCONV_RETURN_IF_ERROR(
        launch(direct_weight_kernel<storage_t, outputs>, blocks, kThreads, kWeightBytes<acc_t>, stream, a));
    return add_shares(static_cast<const acc_t*>(workspace), shares.count, count,
                      static_cast<storage_t*>(call.gradients.weight), stream);
  });
}

#define DYNCONV_INSTANTIATE(storage_t)                                                                                  \
  template cudaError_t run_direct_forward<storage_t>(const DeformCall&, const void*, void*, cudaStream_t);              \
  template cudaError_t run_direct_data<storage_t>(const DeformConv2dParams&, const DataArguments&, const void*,         \
                                                  cudaStream_t);                                                        \
  template int64_t direct_weight_workspace<storage_t>(const DeformConv2dParams&);                                       \
  template cudaError_t run_direct_weight<storage_t>(const DeformBackwardCall&, void*, cudaStream_t);
DYNCONV_INSTANTIATE(double)
DYNCONV_INSTANTIATE(float)
DYNCONV_INSTANTIATE(bfloat16)
DYNCONV_INSTANTIATE(float16)
#undef DYNCONV_INSTANTIATE

}  // namespace deform_cuda
}  // namespace dynconv
