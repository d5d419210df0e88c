// SPDX-License-Identifier: BSD-3-Clause
// dynamic_conv2d's products: forward and the input's gradient, as implicit GEMMs whose weights are mixed on the way.
//
// A block owns a tile of rows (pixels of one or several samples) x results (channels). For each step of the depth it
// copies the rows' source pixels into shared memory, reads the step's tile of the K kernels once, writes its mix for each
// of its samples, and multiplies; one step is prepared while the one before is multiplied. What the mixing and the
// reading of the bank cost is shared by all the block's rows, so blocks have many: small maps share a block.
//
// Where maps are so small that a sample's rows don't pay for its mix, kernels are not mixed: the depth runs over the K
// kernels as well, and the rows are scaled by the attention ("wide": one convolution over cat_k(a_k x)).
#include "common/cuda/launch.h"
#include "dynamic_conv2d/dynamic_conv2d_cuda_conv.h"

namespace dynconv {
namespace dynamic_cuda {
namespace {

// A block's rows x results, by warps that stand kWarpsM x kWarpsN.
template <int rows, int results, int warps_m, int warps_n>
struct Tile {
  static constexpr int kRows = rows, kResults = results, kWarpsM = warps_m;
  static constexpr int kThreads = 32 * warps_m * warps_n;
  static constexpr int kWarpM = rows / warps_m, kWarpN = results / warps_n;
  // Samples that share a block: as many as there are warps along the rows, and as there is shared memory for.
  static constexpr int kMostSamples = 256 / results < warps_m ? 256 / results : warps_m;
  // Compiled for compute capability 9.0 on: 8.0 has neither the shared memory nor, by some bytes, the registers.
  [[maybe_unused]] static constexpr bool kIsLarge = rows * results > 16 * 1024;
};

struct ConvArguments {
  Gather gather;
  Depth depth;
  const void* source;
  ImageStrides source_stride, out_stride;
  const void* bank;  // as in PackedBank
  int num_kernels, results, padded_results;
  const void* mix;   // (N, K) acc
  const void* bias;  // (K, groups * results), or null
  void* out;
  int batch, groups;
  int sample_rows;   // rows of a block that a sample has; wide: all
  int row_tiles, result_tiles;
  int out_vectors;   // 16 bytes at once
};

constexpr int kFewKernels = 4;  // that a thread keeps a chunk of

// That a multiprocessor runs at once; a plain product needs the registers.
template <class T, class Tile>
constexpr int kBlocksOf = Tile::kThreads > 256 || std::is_same_v<typename T::operand_t, typename T::acc_t> ? 1 : 2;

template <class T, class Tile>
struct ConvShared {
  using acc_t = typename T::acc_t;
  using storage_t = typename T::storage_t;
  static constexpr int kSource = Tile::kRows * kRowBytes;
  static constexpr int kKernel = Tile::kResults * kRowBytes;  // of a sample
  static constexpr int kPlaces = Tile::kRows * int(sizeof(Place) + sizeof(int64_t));
  static constexpr int kMix = Tile::kMostSamples * kFewKernels * int(sizeof(acc_t));
  static constexpr int kBias = Tile::kMostSamples * Tile::kResults * int(sizeof(acc_t));
  static constexpr int kFixed = 2 * kSource + kPlaces + kMix + kBias;
  // Results on their way out: rows of results, or of pixels, each a chunk longer than it needs against bank conflicts.
  static constexpr int kPitchLast = Tile::kResults + 16 / int(sizeof(storage_t));
  static constexpr int kPitchFirst = Tile::kRows + 16 / int(sizeof(storage_t));
  static constexpr int kOut = (Tile::kRows * kPitchLast > Tile::kResults * kPitchFirst ? Tile::kRows * kPitchLast
                                                                                       : Tile::kResults * kPitchFirst) *
                              int(sizeof(storage_t));
  static constexpr int bytes(int samples) {
    const int tiles = kFixed + 2 * samples * kKernel, out = kOut + kPlaces + kMix + kBias;
    return tiles > out ? tiles : out;
  }
};

template <class T, bool vectors, bool wide, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kBlocksOf<T, Tile>) conv_kernel(const ConvArguments a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (Tile::kIsLarge) return;
#endif
  using storage_t = typename T::storage_t;
  using acc_t = typename T::acc_t;
  using Product = dynconv::Product<tile_t<T>, false>;
  using Shared = ConvShared<T, Tile>;
  constexpr int V = T::kChunk;
  constexpr bool kCopies = vectors && !wide;  // source chunks go to shared memory as they are
  // Numbers that are read one by one would take too many registers if they waited for the product.
  constexpr bool kFetchesAhead = vectors;
  constexpr int kItems = Tile::kRows * kRowChunks / Tile::kThreads / kSlices;  // source chunks of a thread, a slice
  constexpr int kMixes = (Tile::kResults * kRowChunks + Tile::kThreads - 1) / Tile::kThreads;  // chunks it mixes, a step
  static_assert(kItems >= 1 && (wide || kMixes <= 2));

  unsigned char* const shared = dynamic_shared();
  auto* const out_places = reinterpret_cast<int64_t*>(shared);  // of the rows' first result; -1 where there is no row
  auto* const places = reinterpret_cast<Place*>(out_places + Tile::kRows);
  auto* const few_mix = reinterpret_cast<acc_t*>(shared + Shared::kPlaces);  // (samples, kFewKernels)
  auto* const biases = few_mix + Tile::kMostSamples * kFewKernels;           // (samples, kResults)
  unsigned char* const sources = reinterpret_cast<unsigned char*>(biases + Tile::kMostSamples * Tile::kResults);
  unsigned char* const kernels = sources + 2 * Shared::kSource;

  const int thread = int(threadIdx.x), warp = thread / 32;
  int64_t block = blockIdx.x;
  auto digit = [&](int64_t base) {
    const int64_t d = block % base;
    block /= base;
    return int(d);
  };
  const int first_result = digit(a.result_tiles) * Tile::kResults;
  const int g = digit(a.groups);
  const int phase = digit(a.gather.phases());
  const int phase_y = phase / a.gather.x.phases, phase_x = phase - phase_y * a.gather.x.phases;
  const int64_t first_row = int64_t(digit(a.row_tiles)) * (wide ? Tile::kRows : a.sample_rows);
  const int samples = wide ? 1 : Tile::kRows / a.sample_rows;
  const int first_sample = wide ? 0 : int(block) * samples;
  const bool transposed = a.gather.transposed != 0;

  for (int m = thread; m < Tile::kRows; m += Tile::kThreads) {
    const int width = a.gather.x.pixels(phase_x);
    const int64_t pixels = int64_t(a.gather.y.pixels(phase_y)) * width;
    int64_t image, number;  // of the pixel in its phase
    if constexpr (wide) {
      image = pixels ? (first_row + m) / pixels : a.batch;
      number = first_row + m - image * pixels;
    } else {
      image = first_sample + m / a.sample_rows;
      number = first_row + m % a.sample_rows;
    }
    Place place{-1, 0, 0};
    int64_t out_place = -1;
    if (image < a.batch && number < pixels) {
      const int y = int(number / width), x = int(number - int64_t(y) * width);
      place = {int(image), a.gather.y.base(y, transposed), a.gather.x.base(x, transposed)};
      out_place = image * a.out_stride.batch + a.gather.y.pixel(phase_y, y) * a.out_stride.row +
                  a.gather.x.pixel(phase_x, x) * a.out_stride.pixel +
                  (int64_t(g) * a.results + first_result) * a.out_stride.channel;
    }
    places[m] = place;
    out_places[m] = out_place;
  }
  const auto* const mix = static_cast<const acc_t*>(a.mix);
  auto mix_of = [&](int sample, int k) {
    const int n = first_sample + sample;
    return n < a.batch && k < a.num_kernels ? mix[int64_t(n) * a.num_kernels + k] : acc_t(0);
  };
  if constexpr (!wide) {
    for (int i = thread; i < samples * kFewKernels; i += Tile::kThreads)
      few_mix[i] = mix_of(i / kFewKernels, i % kFewKernels);
    const auto* const bias = static_cast<const storage_t*>(a.bias);
    for (int i = thread; i < samples * Tile::kResults; i += Tile::kThreads) {
      const int result = first_result + i % Tile::kResults;
      acc_t sum = 0;
      if (bias != nullptr && result < a.results)
        for (int k = 0; k < a.num_kernels; ++k)
          sum += mix_of(i / Tile::kResults, k) *
                 to_acc(bias[(int64_t(k) * a.groups + g) * a.results + result]);
      biases[i] = sum;
    }
  }

  // ------------------------------------------------------------------------------------------------ sources of rows
  struct Tap {
    int y, x;
    bool met;
  };
  auto tap_of = [&](int tap) {
    const int i = tap / a.gather.x.taps, j = tap - i * a.gather.x.taps;
    return Tap{a.gather.y.offset(phase_y, i, transposed), a.gather.x.offset(phase_x, j, transposed),
               a.gather.y.meets(phase_y, i, transposed) && a.gather.x.meets(phase_x, j, transposed)};
  };
  const auto* const source = static_cast<const storage_t*>(a.source) +
                             int64_t(g) * a.depth.channels * a.source_stride.channel;
  // The pixel that a row's tap reads, at the group's first channel; null where there is none.
  auto pixel_of = [&](const Place& place, const Tap& tap) -> const storage_t* {
    const int y = place.y + tap.y, x = place.x + tap.x;
    if (place.image < 0 || !tap.met || unsigned(y) >= unsigned(a.gather.y.source_size) ||
        unsigned(x) >= unsigned(a.gather.x.source_size))
      return nullptr;
    return source + place.image * a.source_stride.batch + y * a.source_stride.row + x * a.source_stride.pixel;
  };

  // ---------------------------------------------------------------------------------------------------------- steps
  const int steps = a.depth.count(), kernels_of_step = wide ? a.num_kernels : 1;
  // The first step from `step` on that this phase meets.
  auto next_met = [&](int step) {
    if (transposed && a.gather.phases() > 1 && a.depth.taps_of_step == 1)
      while (step < steps && !tap_of(step % a.depth.tap_steps).met) ++step;
    return step;
  };
  int ahead = next_met(0), ahead_kernel = 0, fill = 0;
  auto slices_of = [&](int step) { return (DepthStep(a.depth, step).columns() + Product::kDepth - 1) / Product::kDepth; };

  typename Product::template Sums<Tile::kWarpM, Tile::kWarpN> sums;
  const int warp_m = warp % Tile::kWarpsM * Tile::kWarpM, warp_n = warp / Tile::kWarpsM * Tile::kWarpN;
  const int warp_sample = wide ? 0 : warp_m / a.sample_rows;

  // One source chunk of a row: copied at once, or fetched, then (other work in between) written.
  struct Fetched {
    uint4 bits;
    storage_t numbers[V];
  };
  auto place_of = [&](int item, int* row, int* chunk) {
    if constexpr (vectors) *row = item / kRowChunks, *chunk = item % kRowChunks;
    else *row = item % Tile::kRows, *chunk = item / Tile::kRows;
  };
  auto fetch = [&](const DepthStep& step, const Tap& step_tap, int slices, int item, unsigned char* to, Fetched* fetched) {
    int row, chunk;
    place_of(item, &row, &chunk);
    if (chunk >= 2 * slices) return;
    const Place place = places[row];
    int t = 0, c = chunk * V;
    if (!vectors || step.taps > 1) t = c / step.channels, c -= t * step.channels;
    if constexpr (vectors) {
      const storage_t* pixel = nullptr;
      if (t < step.taps && c < step.channels) pixel = pixel_of(place, step.taps > 1 ? tap_of(step.first_tap + t) : step_tap);
      const storage_t* const from = pixel == nullptr ? source : pixel + step.first_channel + c;
      if constexpr (kCopies) copy_async_16_cached(to + chunk_offset(row, chunk), from, pixel != nullptr);
      else fetched->bits = pixel == nullptr ? make_uint4(0, 0, 0, 0) : __ldg(reinterpret_cast<const uint4*>(from));
    } else {
      const storage_t* pixel = t < step.taps ? pixel_of(place, tap_of(step.first_tap + t)) : nullptr;
      DYNCONV_UNROLL
      for (int e = 0; e < V; ++e, ++c) {
        if (c == step.channels) {
          c = 0, ++t;
          pixel = t < step.taps ? pixel_of(place, tap_of(step.first_tap + t)) : nullptr;
        }
        fetched->numbers[e] = pixel != nullptr ? pixel[(step.first_channel + c) * a.source_stride.channel] : storage_t{};
      }
    }
  };
  auto write = [&](int slices, int item, int kernel, unsigned char* to, const Fetched& fetched) {
    int row, chunk;
    place_of(item, &row, &chunk);
    if (chunk >= 2 * slices) return;
    uint4 bits = fetched.bits;
    if constexpr (!vectors) __builtin_memcpy(&bits, fetched.numbers, 16);
    if constexpr (wide) {
      const int image = places[row].image;
      const acc_t scale = image < 0 ? acc_t(0) : mix[int64_t(image) * a.num_kernels + kernel];
      acc_t v[V];
      unpack(bits, storage_t(), v);
      DYNCONV_UNROLL
      for (int e = 0; e < V; ++e) v[e] *= scale;
      write_chunk(v, storage_t(), to + chunk_offset(row, chunk));
    } else {
      *reinterpret_cast<uint4*>(to + chunk_offset(row, chunk)) = bits;
    }
  };

  const unsigned char* const bank = static_cast<const unsigned char*>(a.bank) +
                                    (int64_t(g) * steps * a.num_kernels * a.padded_results + first_result) * kRowBytes;
  // The step's tile of kernel k.
  auto bank_tile = [&](int step, int k) {
    return bank + (int64_t(step) * a.num_kernels + k) * a.padded_results * kRowBytes;
  };
  auto load_kernels = [&](int step, int slices, int item, uint4 (&bits)[kFewKernels]) {
    if (a.num_kernels > kFewKernels || item >= Tile::kResults * kRowChunks || item % kRowChunks >= 2 * slices) return;
    DYNCONV_UNROLL
    for (int k = 0; k < kFewKernels; ++k)
      bits[k] = k < a.num_kernels ? __ldg(reinterpret_cast<const uint4*>(bank_tile(step, k)) + item) : make_uint4(0, 0, 0, 0);
  };
  auto mix_kernels = [&](int step, int slices, int item, const uint4 (&bits)[kFewKernels], unsigned char* to) {
    if (item >= Tile::kResults * kRowChunks || item % kRowChunks >= 2 * slices) return;
    unsigned char* const at = to + chunk_offset(item / kRowChunks, item % kRowChunks);
    if (a.num_kernels <= kFewKernels) {
      // Half a chunk at a time: of a whole one, the numbers of all kernels would fill the registers.
      DYNCONV_UNROLL
      for (int half = 0; half < 2; ++half) {
        acc_t v[kFewKernels][V / 2];
        DYNCONV_UNROLL
        for (int k = 0; k < kFewKernels; ++k) unpack_half(bits[k], half, storage_t(), v[k]);
        DYNCONV_NO_UNROLL
        for (int sample = 0; sample < samples; ++sample) {
          acc_t sum[V / 2] = {};
          DYNCONV_UNROLL
          for (int k = 0; k < kFewKernels; ++k) {
            const acc_t scale = few_mix[sample * kFewKernels + k];
            DYNCONV_UNROLL
            for (int e = 0; e < V / 2; ++e) sum[e] += scale * v[k][e];
          }
          write_half_chunk(sum, storage_t(), at + sample * Shared::kKernel + 8 * half);
        }
      }
    } else {
      DYNCONV_NO_UNROLL
      for (int sample = 0; sample < samples; ++sample) {
        acc_t sum[V] = {};
        DYNCONV_NO_UNROLL
        for (int k = 0; k < a.num_kernels; ++k) {
          acc_t v[V];
          unpack(__ldg(reinterpret_cast<const uint4*>(bank_tile(step, k)) + item), storage_t(), v);
          const acc_t scale = mix_of(sample, k);
          DYNCONV_UNROLL
          for (int e = 0; e < V; ++e) sum[e] += scale * v[e];
        }
        write_chunk(sum, storage_t(), at + sample * Shared::kKernel);
      }
    }
  };

  // Prepares `ahead` in one half of the shared memory, and multiplies what is in the other; either may be left out.
  auto work = [&](auto prepares, auto multiplies, int multiplied_slices) {
    constexpr bool kPrepares = decltype(prepares)::value, kMultiplies = decltype(multiplies)::value;
    const int all = samples * Shared::kKernel;
    unsigned char* const source_to = sources + fill * Shared::kSource;
    unsigned char* const kernel_to = kernels + fill * all;
    const unsigned char* const source_from = sources + (fill ^ 1) * Shared::kSource;
    const unsigned char* const kernel_from = kernels + (fill ^ 1) * all + warp_sample * Shared::kKernel;
    const DepthStep step(a.depth, kPrepares ? ahead : 0);
    const int slices = (step.columns() + Product::kDepth - 1) / Product::kDepth;
    [[maybe_unused]] const Tap step_tap = tap_of(step.first_tap);
    if constexpr (kPrepares && wide) {
      for (int i = thread; i < Tile::kResults * kRowChunks; i += Tile::kThreads)
        copy_async_16(kernel_to + chunk_offset(i / kRowChunks, i % kRowChunks), bank_tile(ahead, ahead_kernel) + i * 16);
    }
    // Before the product: what addresses are made of would live through it.
    if constexpr (kPrepares && kCopies) {
      Fetched none;
      DYNCONV_NO_UNROLL
      for (int item = thread; item < Tile::kRows * kRowChunks; item += Tile::kThreads)
        fetch(step, step_tap, slices, item, source_to, &none);
    }
    [[maybe_unused]] uint4 bits[kMixes][kFewKernels];
    if constexpr (kPrepares && !wide && kFetchesAhead) {
      DYNCONV_UNROLL
      for (int i = 0; i < kMixes; ++i) load_kernels(ahead, slices, thread + i * Tile::kThreads, bits[i]);
    }
    // Rolled: unrolled, its addresses alone would fill the registers.
    DYNCONV_NO_UNROLL
    for (int slice = 0; slice < kSlices; ++slice) {
      [[maybe_unused]] Fetched fetched[kItems];
      if constexpr (kPrepares && kFetchesAhead && !kCopies) {
        DYNCONV_UNROLL
        for (int i = 0; i < kItems; ++i)
          fetch(step, step_tap, slices, thread + (slice * kItems + i) * Tile::kThreads, source_to, &fetched[i]);
      }
      if constexpr (kMultiplies)
        if (slice < multiplied_slices)
          Product::template add<Tile::kWarpM, Tile::kWarpN>(sums, source_from, warp_m, 0, kernel_from, warp_n, 0, slice);
      if constexpr (kPrepares && kFetchesAhead && !kCopies) {
        DYNCONV_UNROLL
        for (int i = 0; i < kItems; ++i)
          write(slices, thread + (slice * kItems + i) * Tile::kThreads, ahead_kernel, source_to, fetched[i]);
      }
    }
    if constexpr (kPrepares && !kFetchesAhead) {
      DYNCONV_NO_UNROLL
      for (int item = thread; item < Tile::kRows * 2 * slices; item += Tile::kThreads) {
        Fetched fetched;
        fetch(step, step_tap, slices, item, source_to, &fetched);
        write(slices, item, ahead_kernel, source_to, fetched);
      }
    }
    if constexpr (kPrepares && !wide) {
      DYNCONV_UNROLL
      for (int i = 0; i < kMixes; ++i) {
        const int item = thread + i * Tile::kThreads;
        if constexpr (!kFetchesAhead) load_kernels(ahead, slices, item, bits[i]);
        mix_kernels(ahead, slices, item, bits[i], kernel_to);
      }
    }
    if constexpr (kPrepares) copy_async_commit();
  };
  // To the step after `ahead`, which is then there for all. False after the last step.
  auto advance = [&] {
    if (++ahead_kernel == kernels_of_step) ahead_kernel = 0, ahead = next_met(ahead + 1);
    fill ^= 1;
    copy_async_wait<0>();
    __syncthreads();
    return ahead < steps;
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  __syncthreads();
  if (ahead < steps) {
    int slices = slices_of(ahead);
    work(yes, no, 0);
    while (advance()) {
      const int next_slices = slices_of(ahead);
      work(yes, yes, slices);
      slices = next_slices;
    }
    work(no, yes, slices);
  }

  // --------------------------------------------------------------------------------------------------------- results
  // Through shared memory, so that neighbours in global memory are written together.
  __syncthreads();
  auto* const tile = reinterpret_cast<storage_t*>(sources);
  const bool last = a.out_stride.channel == 1;
  const auto* const bias = static_cast<const storage_t*>(a.bias);
  Product::for_each(sums, [&](int m, int n, acc_t sum) {
    m += warp_m, n += warp_n;
    if constexpr (!wide) {
      sum += biases[warp_sample * Tile::kResults + n];
    } else if (bias != nullptr && first_result + n < a.results && places[m].image >= 0) {
      for (int k = 0; k < a.num_kernels; ++k)
        sum += mix[int64_t(places[m].image) * a.num_kernels + k] *
               to_acc(bias[(int64_t(k) * a.groups + g) * a.results + first_result + n]);
    }
    from_acc(sum, tile + (last ? m * Shared::kPitchLast + n : n * Shared::kPitchFirst + m));
  });
  __syncthreads();
  auto* const out = static_cast<storage_t*>(a.out);
  const int unit = a.out_vectors ? V : 1;
  const int units = (last ? Tile::kResults : Tile::kRows) / unit;
  for (int i = thread; i < Tile::kRows * Tile::kResults / unit; i += Tile::kThreads) {
    const int m = last ? i / units : i % units * unit, n = last ? i % units * unit : i / units;
    const int64_t place = out_places[m];
    if (place < 0 || first_result + n >= a.results) continue;
    const storage_t* const from = tile + (last ? m * Shared::kPitchLast + n : n * Shared::kPitchFirst + m);
    storage_t* const to = out + place + n * a.out_stride.channel;
    if (a.out_vectors) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    else *to = *from;
  }
}

// A thread packs all taps of a kernel's weight: neighbours write neighbours. Rows of the result: PackedBank.
template <class T>
__global__ void pack_bank_kernel(const PackedBank bank, bool transposed, const typename T::storage_t* weight,
                                 typename T::storage_t* packed, int channels, int64_t count) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  const Depth& d = bank.depth;
  const int channel = int(i % channels);
  int64_t rest = i / channels;
  const int result = int(rest % bank.padded_results);
  rest /= bank.padded_results;
  const int k = int(rest % bank.num_kernels), g = int(rest / bank.num_kernels);
  const bool exists = channel < d.channels && result < bank.results;
  // (K, groups, output, input, taps): transposed, the result is the input channel.
  const int64_t kernel = int64_t(k) * bank.groups + g;
  const auto* const from =
      weight + (transposed ? (kernel * d.channels + channel) * bank.results + result
                           : (kernel * bank.results + result) * d.channels + channel) * d.taps;
  for (int tap = 0; tap < d.taps; ++tap) {
    const int64_t step = int64_t(g) * d.count() + d.step(channel, tap);
    packed[((step * bank.num_kernels + k) * bank.padded_results + result) * d.row + d.column(channel, tap)] =
        exists ? from[tap] : typename T::storage_t{};
  }
}

template <class T>
cudaError_t pack_bank(const PackedBank& bank, bool transposed, const void* weight, void* packed, cudaStream_t stream) {
  using storage_t = typename T::storage_t;
  constexpr int kThreads = 256;
  const Depth& d = bank.depth;
  // Steps of several taps, or fewer channels than columns: what no thread writes.
  const bool covered = d.channels >= d.row;
  if (!covered)
    DYNCONV_RETURN_IF_ERROR(cudaMemsetAsync(packed, 0, size_t(bank.numbers()) * sizeof(storage_t), stream));
  const int channels = covered ? d.chunks * d.row : d.channels;
  const int64_t count = int64_t(bank.groups) * bank.num_kernels * bank.padded_results * channels;
  return launch(pack_bank_kernel<T>, ceil_div(count, kThreads), kThreads, 0, stream, bank, transposed,
                static_cast<const storage_t*>(weight), static_cast<storage_t*>(packed), channels, count);
}

// ------------------------------------------------------------------------------------------------------- launchers

// How a product is done.
template <class T>
struct Plan {
  static constexpr bool kTensorCores = !std::is_same_v<typename T::operand_t, typename T::acc_t>;
  // Many rows; many samples of small maps; little work, and wide.
  using Big = std::conditional_t<kTensorCores, Tile<512, 64, 8, 2>,
                                 std::conditional_t<sizeof(typename T::acc_t) == 8, Tile<128, 64, 2, 4>, Tile<256, 64, 4, 2>>>;
  using Deep = std::conditional_t<kTensorCores, Tile<512, 32, 16, 1>, Big>;
  using Small = std::conditional_t<kTensorCores, Tile<128, 64, 4, 2>, Big>;

  enum { wide, small, deep, big } way;
  int samples;  // of a block
  PackedBank bank;

  Plan(const ConvProduct& product, int64_t num_kernels)
      : bank{Depth(product.channels, int64_t(product.gather.y.taps) * product.gather.x.taps, T::kRow), product.groups,
             int(num_kernels), int(product.results), 0} {
    const int64_t pixels = product.gather.pixels();
    const int big_samples = samples_of<Big>(pixels), deep_samples = samples_of<Deep>(pixels);
    if (product.wide) way = wide, samples = 1;
    else if (deep_samples > big_samples && suits<Deep>(product, deep_samples)) way = deep, samples = deep_samples;
    else if (!kTensorCores) way = big, samples = fitting<Big>(big_samples);
    else if (suits<Big>(product, big_samples)) way = big, samples = big_samples;
    else way = small, samples = fitting<Small>(samples_of<Small>(pixels));
    static_assert(Small::kResults == Big::kResults);
    bank.padded_results = int(round_up(product.results, way == deep ? Deep::kResults : Big::kResults));
  }
  int64_t bank_bytes() const { return round_up(bank.numbers() * int64_t(sizeof(typename T::storage_t)), kWorkspaceAlignment); }

 private:
  // As many samples as a tile takes, but no more than it takes to have a sample's pixels in one tile.
  template <class Tile>
  static int samples_of(int64_t pixels) {
    int samples = Tile::kMostSamples;
    while (samples > 1 && Tile::kRows / samples < pixels) samples /= 2;
    return samples;
  }
  // And as the device has shared memory for.
  template <class Tile>
  static int fitting(int samples) {
    while (samples > 1 && size_t(ConvShared<T, Tile>::bytes(samples)) > shared_memory_limit()) samples /= 2;
    return samples;
  }
  // Whether there is work for all multiprocessors, and shared memory.
  template <class Tile>
  static bool suits(const ConvProduct& p, int samples) {
    const int64_t blocks = ceil_div(p.batch, samples) * ceil_div(p.gather.pixels(), Tile::kRows / samples) *
                           p.gather.phases() * p.groups * ceil_div(p.results, Tile::kResults);
    if (Tile::kIsLarge && compute_capability() < 90) return false;
    return blocks >= multiprocessors() && fitting<Tile>(samples) == samples &&
           size_t(ConvShared<T, Tile>::bytes(samples)) <= shared_memory_limit();
  }
};

template <class T, bool vectors, bool wide, class Tile>
cudaError_t launch_conv(ConvArguments a, int samples, int64_t pixels, cudaStream_t stream) {
  a.result_tiles = a.padded_results / Tile::kResults;
  a.sample_rows = Tile::kRows / samples;
  const int64_t row_tiles = ceil_div(wide ? a.batch * pixels : pixels, a.sample_rows);
  // Below 2^31 rows: pixels are, but for wide products, which have few of them.
  a.row_tiles = int(row_tiles);
  const int64_t blocks =
      row_tiles * a.result_tiles * a.groups * a.gather.phases() * (wide ? 1 : ceil_div(a.batch, samples));
  return launch(conv_kernel<T, vectors, wide, Tile>, blocks, Tile::kThreads, size_t(ConvShared<T, Tile>::bytes(samples)),
                stream, a);
}

template <class T, bool vectors>
cudaError_t launch_plan(const Plan<T>& plan, const ConvArguments& a, int64_t pixels, cudaStream_t stream) {
  if (plan.way == Plan<T>::wide) return launch_conv<T, vectors, true, typename Plan<T>::Small>(a, 1, pixels, stream);
  if constexpr (Plan<T>::kTensorCores) {
    if (plan.way == Plan<T>::small)
      return launch_conv<T, vectors, false, typename Plan<T>::Small>(a, plan.samples, pixels, stream);
    if (plan.way == Plan<T>::deep)
      return launch_conv<T, vectors, false, typename Plan<T>::Deep>(a, plan.samples, pixels, stream);
  }
  return launch_conv<T, vectors, false, typename Plan<T>::Big>(a, plan.samples, pixels, stream);
}

}  // namespace

template <class T>
int64_t conv_workspace(const ConvProduct& product, int64_t num_kernels) {
  return Plan<T>(product, num_kernels).bank_bytes();
}

template <class T>
cudaError_t run_conv(const ConvProduct& product, int64_t num_kernels, const void* weight, const void* bias,
                     const void* mix, void* workspace, cudaStream_t stream) {
  const Plan<T> plan(product, num_kernels);
  DYNCONV_RETURN_IF_ERROR(pack_bank<T>(plan.bank, product.gather.transposed != 0, weight, workspace, stream));
  const int64_t pixels = product.gather.pixels();
  constexpr int V = T::kChunk;
  const bool last = product.out_stride.channel == 1;
  const bool aligned = is_aligned(product.out, 16);
  // Runs of a chunk that stay in a row of the tile and begin at a multiple of 16 bytes.
  const bool out_vectors = aligned && (last ? product.results % V == 0
                                            : product.gather.phases() == 1 && pixels % V == 0 && plan.way != Plan<T>::wide);
  const ConvArguments a{product.gather,
                        plan.bank.depth,
                        product.source,
                        product.source_stride,
                        product.out_stride,
                        workspace,
                        int(num_kernels),
                        int(product.results),
                        plan.bank.padded_results,
                        mix,
                        bias,
                        product.out,
                        int(product.batch),
                        product.groups,
                        0,
                        0,
                        0,
                        out_vectors};
  if (has_vectors(product.source, product.source_stride.channel == 1, product.channels, V))
    return launch_plan<T, true>(plan, a, pixels, stream);
  return launch_plan<T, false>(plan, a, pixels, stream);
}

#define DYNCONV_INSTANTIATE(...)                                                  \
  template int64_t conv_workspace<__VA_ARGS__>(const ConvProduct&, int64_t);       \
  template cudaError_t run_conv<__VA_ARGS__>(const ConvProduct&, int64_t, const void*, const void*, const void*, void*, \
                                             cudaStream_t);
DYNCONV_FOR_EACH_TYPES(DYNCONV_INSTANTIATE)
#undef DYNCONV_INSTANTIATE

}  // namespace dynamic_cuda
}  // namespace dynconv
