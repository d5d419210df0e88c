// SPDX-License-Identifier: BSD-3-Clause
// dynamic_conv2d with few outputs a group, and its gradient with respect to the input where a group has few inputs.
//
// Both gather: each number of a tensor `to` is a sum over `depth` channels of its group of a tensor `from`, and over
// taps. For a row y of `to`, tap i reads a row of `from`:
//   forward:     to = out,        from = input:     row y * stride - padding + i * dilation
//   grad_input:  to = grad_input, from = grad_out:  row (y + padding - i * dilation) / stride, where that is whole
//
// A block does one sample, some units of channels, and some strips of pixels. A unit is a group, or, where each group
// has one channel on both sides, kChunk neighbouring groups. A strip is kRows rows of one column; its rows stand so far
// apart that the same taps reach all of them. The block's kernels are mixed in shared memory; each thread then keeps a
// strip of a unit in registers. Nothing is added in an order that depends on the device.
#include "common/cuda/launch.h"
#include "dynamic_conv2d/dynamic_conv2d_direct.h"

#include <numeric>

namespace dynconv {
namespace dynamic_cuda {
namespace {

constexpr int kThreads = 256;  // of a block, at most
constexpr int kRows = 4;       // of a strip
constexpr int kMixedAtOnce = 4;
constexpr int kSharedBytes = 40 * 1024;  // of mixed kernels; a larger depth is done in chunks

// What a thread reads at once.
enum class Reads {
  numbers,  // one channel of its group
  depth,    // kChunk channels of its group, 16 bytes
  groups,   // the channels of its kChunk groups, 16 bytes
};

// Rows or columns. Sizes are below 2^31; where a step leads far beyond them, arithmetic is modulo 2^32 and what it
// gives is compared with the size.
struct Axis {
  int kernel, stride, padding, dilation;
  bool transposed;  // grad_input
  int from, to;     // sizes
  int step;         // between taps that reach the same place
  int tap_move;     // of what is read, from one such tap to the next
  int spread;       // between the places of a strip
  int strip_move;   // of what is read, from one such place to the next

  Axis(int64_t kernel_, int64_t stride_, int64_t padding_, int64_t dilation_, int64_t input, int64_t output,
       bool transposed_)
      : kernel(int(kernel_)),
        stride(int(stride_)),
        padding(int(padding_)),
        dilation(int(dilation_)),
        transposed(transposed_),
        from(int(transposed ? output : input)),
        to(int(transposed ? input : output)),
        step(transposed ? stride / std::gcd(stride, dilation) : 1),
        tap_move(transposed ? -int(int64_t(step) * dilation / stride) : dilation),
        spread(transposed ? (stride < to ? stride : to) : 1),
        strip_move(transposed ? 1 : stride) {}

  // Strips along the axis, and the first place of one.
  int64_t strips() const {
    const int64_t whole = int64_t(kRows) * spread, rest = to % whole;
    return to / whole * spread + (rest < spread ? rest : spread);
  }
  __device__ int strip_begin(int strip) const {
    return int(int64_t(strip / spread) * kRows * spread + strip % spread);
  }
  // The first tap that reaches a place, and what it reads; kernel if none does.
  __device__ int first_tap(int place, int* source) const {
    if (!transposed) {
      *source = place * stride - padding;
      return 0;
    }
    for (int tap = 0; tap < step && tap < kernel; ++tap) {
      const int at = place + padding - tap * dilation;
      if (at % stride == 0) {
        *source = at / stride;
        return tap;
      }
    }
    *source = -1;
    return kernel;
  }
};

struct DirectArguments {
  const void* from;
  ImageStrides from_stride;
  void* to;
  ImageStrides to_stride;
  const void *weight, *bias, *mix;
  int num_kernels, out_channels;
  int64_t kernel_size, group_weights, output_weights, depth_weights;  // between numbers of the weight
  int groups, depth, outputs;                                        // channels of a group: read, written
  Axis rows, columns;
  bool lanes_are_units;  // else neighbouring threads have neighbouring pixels
  bool packed;           // a group's outputs are written at once
  int units, block_units, unit_tiles;
  int block_strips, passes;
  int64_t strips, strip_tiles;
  int depth_chunk, tap_chunk, chunks, tap_chunks;
};

// Mixed kernels in shared memory: M numbers for each unit at each entry (depth, tap). These lie in pieces of 16 bytes
// at most, the pieces of all units side by side, and entries 16 bytes further apart than they need: neither threads of
// neighbouring units that read, nor threads of neighbouring entries that write, meet in a bank.
template <class acc_t, int M>
struct KernelTile {
  static constexpr int kPad = 16 / int(sizeof(acc_t));
  static constexpr int kPiece = M < kPad ? M : kPad;
  struct alignas(kPiece * sizeof(acc_t)) Piece {
    acc_t v[kPiece];
  };

  acc_t* data;
  int units;

  static __host__ __device__ int entry_size(int units) { return units * M + kPad; }
  DYNCONV_DEVICE acc_t* at(int entry, int unit, int m) const {
    return data + entry * entry_size(units) + (m / kPiece * units + unit) * kPiece + m % kPiece;
  }
  // Numbers m to m + kPiece, m being a multiple of kPiece.
  DYNCONV_DEVICE Piece piece(int entry, int unit, int m) const {
    return *reinterpret_cast<const Piece*>(at(entry, unit, m));
  }
  DYNCONV_DEVICE void read(int entry, int unit, acc_t (&v)[M]) const {
    DYNCONV_UNROLL
    for (int m = 0; m < M; m += kPiece) {
      const Piece p = piece(entry, unit, m);
      DYNCONV_UNROLL
      for (int e = 0; e < kPiece; ++e) v[m + e] = p.v[e];
    }
  }
};

// A chunk of the depth: some channels at all taps, or one channel at some taps.
struct Chunk {
  int first_channel, channels, first_tap, taps;

  __device__ Chunk(const DirectArguments& a, int number) {
    const int all_taps = a.rows.kernel * a.columns.kernel;
    first_channel = number / a.tap_chunks * a.depth_chunk;
    first_tap = number % a.tap_chunks * a.tap_chunk;
    channels = a.depth - first_channel < a.depth_chunk ? a.depth - first_channel : a.depth_chunk;
    taps = all_taps - first_tap < a.tap_chunk ? all_taps - first_tap : a.tap_chunk;
  }
};

// R: outputs of a group in registers; those that don't exist have a kernel of zeros. kTaps rows of taps, whose sources
// follow each other, with sources of a strip's rows kStep apart, share what they read; kTaps = 0: any.
template <class T, Reads reads, int R, int kTaps, int kStep>
struct DirectKernel {
  using storage_t = typename T::storage_t;
  using acc_t = typename T::acc_t;
  static constexpr int V = T::kChunk;
  static constexpr int M = reads == Reads::groups ? V : R;
  static constexpr int kUnitGroups = reads == Reads::groups ? V : 1;
  // Blocks that a multiprocessor's registers hold: 128 a thread are too few for the sums of 8 outputs in double, and
  // for the largest window of 8 groups.
  static constexpr int kBlocks = M * sizeof(acc_t) > 32 || (M == 8 && kTaps == 5 && kStep == 2) ? 1 : 2;
  using Tile = KernelTile<acc_t, M>;

  const DirectArguments& a;
  Tile tile;
  int64_t sample;
  int first_unit;

  // The sum over kernels of the bank of mix * value(k), to each number of a tile: add(number, sums so far are there).
  template <class F>
  DYNCONV_DEVICE void mix(int numbers, F add) const {
    const auto* const weights = static_cast<const acc_t*>(a.mix) + sample * a.num_kernels;
    for (int first = 0; first < a.num_kernels; first += kMixedAtOnce) {
      acc_t w[kMixedAtOnce];
      DYNCONV_UNROLL
      for (int k = 0; k < kMixedAtOnce; ++k) w[k] = first + k < a.num_kernels ? weights[first + k] : acc_t(0);
      for (int i = int(threadIdx.x); i < numbers; i += int(blockDim.x)) add(i, first, w);
    }
  }
  DYNCONV_DEVICE acc_t mixed(const storage_t* at, int64_t stride, int first, const acc_t (&w)[kMixedAtOnce]) const {
    acc_t sum = 0;
    DYNCONV_UNROLL
    for (int k = 0; k < kMixedAtOnce; ++k)
      if (first + k < a.num_kernels) sum += w[k] * to_acc(at[(first + k) * stride]);
    return sum;
  }

  DYNCONV_DEVICE void mix_kernels(const Chunk& chunk) const {
    const int entries = chunk.channels * chunk.taps;
    mix(tile.units * kUnitGroups * R * entries, [&](int i, int first, const acc_t(&w)[kMixedAtOnce]) {
      const int output = i / entries, entry = i - output * entries, group = output / R, r = output % R;
      const int channel = entry / chunk.taps, tap = entry - channel * chunk.taps;
      const int64_t g = int64_t(first_unit) * kUnitGroups + group;
      acc_t* const to = tile.at(entry, group / kUnitGroups, kUnitGroups > 1 ? group % kUnitGroups : r);
      acc_t sum = 0;
      if (g < a.groups && r < a.outputs)
        sum = mixed(static_cast<const storage_t*>(a.weight) + g * a.group_weights + r * a.output_weights +
                        (chunk.first_channel + channel) * a.depth_weights + chunk.first_tap + tap,
                    a.kernel_size, first, w);
      *to = first == 0 ? sum : *to + sum;
    });
  }

  // Into an entry of its own.
  DYNCONV_DEVICE void mix_biases(const Tile& biases) const {
    mix(tile.units * kUnitGroups * R, [&](int i, int first, const acc_t(&w)[kMixedAtOnce]) {
      const int group = i / R, r = i % R;
      const int64_t g = int64_t(first_unit) * kUnitGroups + group;
      acc_t* const to = biases.at(0, group / kUnitGroups, kUnitGroups > 1 ? group % kUnitGroups : r);
      acc_t sum = 0;
      if (a.bias != nullptr && g < a.groups && r < a.outputs)
        sum = mixed(static_cast<const storage_t*>(a.bias) + g * a.outputs + r, a.out_channels, first, w);
      *to = first == 0 ? sum : *to + sum;
    });
  }

  // What taps of one column read, and add to a strip.
  struct Strip {
    int place, rows;  // first, and how many exist
    int column;
    int first_row_tap, source_row, first_column_tap, source_column;

    DYNCONV_DEVICE Strip(const DirectArguments& a, int strip_row, int column_) : column(column_) {
      place = a.rows.strip_begin(strip_row);
      rows = 0;
      DYNCONV_UNROLL
      for (int i = 0; i < kRows; ++i) rows += int(place + int64_t(i) * a.rows.spread < a.rows.to);
      first_row_tap = a.rows.first_tap(place, &source_row);
      first_column_tap = a.columns.first_tap(column, &source_column);
    }
  };

  DYNCONV_DEVICE void accumulate(const Strip& strip, const storage_t* from, const Chunk& chunk, int unit,
                                 acc_t (&sums)[kRows][M]) const {
    if constexpr (kTaps > 0) add_window(strip, from, chunk, unit, sums);
    else add_taps(strip, from, chunk, unit, sums);
  }

  // from: the image's unit, at the first channel of the chunk.
  DYNCONV_DEVICE void add_taps(const Strip& strip, const storage_t* from, const Chunk& chunk, int unit,
                               acc_t (&sums)[kRows][M]) const {
    const Axis &rows = a.rows, &columns = a.columns;
    const int64_t move = rows.strip_move * a.from_stride.row;
    int y = strip.source_row;
    for (int i = strip.first_row_tap; i < rows.kernel; i += rows.step, y += rows.tap_move) {
      const int row_tap = i * columns.kernel - chunk.first_tap;  // in the chunk
      if (row_tap >= chunk.taps || row_tap + columns.kernel <= 0) continue;
      bool inside[kRows];
      DYNCONV_UNROLL
      for (int p = 0; p < kRows; ++p)
        inside[p] = p < strip.rows && unsigned(y) + unsigned(p) * unsigned(rows.strip_move) < unsigned(rows.from);
      int x = strip.source_column;
      for (int j = strip.first_column_tap; j < columns.kernel; j += columns.step, x += columns.tap_move) {
        const int entry = row_tap + j;
        if (unsigned(entry) >= unsigned(chunk.taps) || unsigned(x) >= unsigned(columns.from)) continue;
        const int64_t at = y * a.from_stride.row + x * a.from_stride.pixel;
        if constexpr (reads == Reads::numbers) {
          for (int channel = 0; channel < chunk.channels; ++channel) {
            acc_t v[kRows], w[M];
            DYNCONV_UNROLL
            for (int p = 0; p < kRows; ++p)
              v[p] = inside[p] ? to_acc(from[at + p * move + channel * a.from_stride.channel]) : acc_t(0);
            tile.read(entry + channel * chunk.taps, unit, w);
            DYNCONV_UNROLL
            for (int p = 0; p < kRows; ++p)
              DYNCONV_UNROLL
              for (int m = 0; m < M; ++m) sums[p][m] += v[p] * w[m];
          }
        } else {
          for (int channel = 0; channel < chunk.channels; channel += V) {
            ChannelChunk<T, true> read[kRows];
            DYNCONV_UNROLL
            for (int p = 0; p < kRows; ++p) read[p].load(from + (at + p * move + channel), 1, int(inside[p]));
            if constexpr (reads == Reads::groups) {
              acc_t w[M];
              tile.read(entry, unit, w);
              DYNCONV_UNROLL
              for (int p = 0; p < kRows; ++p) {
                acc_t v[V];
                read[p].get(v);
                DYNCONV_UNROLL
                for (int m = 0; m < M; ++m) sums[p][m] += v[m] * w[m];
              }
            } else {
              acc_t v[kRows][V];
              DYNCONV_UNROLL
              for (int p = 0; p < kRows; ++p) read[p].get(v[p]);
              DYNCONV_UNROLL
              for (int e = 0; e < V; ++e) {
                acc_t w[M];
                tile.read(entry + (channel + e) * chunk.taps, unit, w);
                DYNCONV_UNROLL
                for (int p = 0; p < kRows; ++p)
                  DYNCONV_UNROLL
                  for (int m = 0; m < M; ++m) sums[p][m] += v[p][e] * w[m];
              }
            }
          }
        }
      }
    }
  }

  // The same where all taps are in the chunk and, down a column, read rows that follow each other.
  DYNCONV_DEVICE void add_window(const Strip& strip, const storage_t* from, const Chunk& chunk, int unit,
                                 acc_t (&sums)[kRows][M]) const {
    const Axis &rows = a.rows, &columns = a.columns;
    constexpr int kHeight = (kRows - 1) * kStep + kTaps;
    // Rows of the window go down: taps as well, or backwards.
    const bool backwards = rows.tap_move < 0;
    const int top = strip.source_row - (backwards ? kTaps - 1 : 0);
    int x = strip.source_column;
    DYNCONV_NO_UNROLL
    for (int j = strip.first_column_tap; j < columns.kernel; j += columns.step, x += columns.tap_move) {
      if (unsigned(x) >= unsigned(columns.from)) continue;
      const int64_t at = top * a.from_stride.row + x * a.from_stride.pixel;
      DYNCONV_NO_UNROLL
      for (int channel = 0; channel < (reads == Reads::groups ? 1 : chunk.channels); ++channel) {
        // All rows are on their way before the first is used; kernels, a piece at a time, to keep registers for them.
        ChannelChunk<T, true> read[kHeight];
        acc_t numbers[kHeight];
        int64_t place = at + channel * a.from_stride.channel;
        DYNCONV_UNROLL
        for (int i = 0; i < kHeight; ++i, place += a.from_stride.row) {
          const bool inside = unsigned(top) + unsigned(i) < unsigned(rows.from);
          if constexpr (reads == Reads::groups) read[i].load(from + place, 1, int(inside));
          else numbers[i] = inside ? to_acc(from[place]) : acc_t(0);
        }
        DYNCONV_UNROLL
        for (int piece = 0; piece < M; piece += Tile::kPiece) {
          typename Tile::Piece w[kTaps];
          DYNCONV_UNROLL
          for (int i = 0; i < kTaps; ++i) {
            const int tap = strip.first_row_tap + (backwards ? kTaps - 1 - i : i) * rows.step;
            w[i] = {};
            if (tap < rows.kernel) w[i] = tile.piece(channel * chunk.taps + tap * columns.kernel + j, unit, piece);
          }
          DYNCONV_UNROLL
          for (int i = 0; i < kHeight; ++i) {
            acc_t v[V] = {numbers[i]};
            if constexpr (reads == Reads::groups) read[i].get(v);
            DYNCONV_UNROLL
            for (int p = 0; p < kRows; ++p) {
              if (i - p * kStep < 0 || i - p * kStep >= kTaps) continue;
              DYNCONV_UNROLL
              for (int m = 0; m < Tile::kPiece; ++m) sums[p][piece + m] += v[piece + m] * w[i - p * kStep].v[m];
            }
          }
        }
      }
    }
  }

  DYNCONV_DEVICE void write(const Strip& strip, int unit, const acc_t (&sums)[kRows][M]) const {
    const int channel = unit * kUnitGroups * a.outputs;
    auto* const to = static_cast<storage_t*>(a.to) + sample * a.to_stride.batch + channel * a.to_stride.channel +
                     strip.column * a.to_stride.pixel;
    DYNCONV_UNROLL
    for (int p = 0; p < kRows; ++p) {
      if (p >= strip.rows) continue;
      storage_t* const at = to + (strip.place + int64_t(p) * a.rows.spread) * a.to_stride.row;
      if constexpr (reads == Reads::groups) {
        write_chunk(sums[p], storage_t(), at);
      } else {
        struct alignas(R * sizeof(storage_t) < 16 ? R * sizeof(storage_t) : 16) Outputs {
          storage_t v[R];
        } outputs;
        DYNCONV_UNROLL
        for (int r = 0; r < R; ++r) from_acc(sums[p][r], &outputs.v[r]);
        if (a.packed) {
          *reinterpret_cast<Outputs*>(at) = outputs;
        } else {
          DYNCONV_UNROLL
          for (int r = 0; r < R; ++r)
            if (r < a.outputs) at[r * a.to_stride.channel] = outputs.v[r];
        }
      }
    }
  }
};

template <class T, Reads reads, int R, int kTaps, int kStep>
__global__ void __launch_bounds__(kThreads, (DirectKernel<T, reads, R, kTaps, kStep>::kBlocks))
    direct_kernel(const __grid_constant__ DirectArguments a) {
  using Kernel = DirectKernel<T, reads, R, kTaps, kStep>;
  using storage_t = typename T::storage_t;
  using acc_t = typename T::acc_t;
  using Tile = typename Kernel::Tile;

  const int thread = int(threadIdx.x);
  const int64_t strip_tile = blockIdx.x % a.strip_tiles;
  const int64_t rest = blockIdx.x / a.strip_tiles;
  const int64_t sample = rest / a.unit_tiles;
  const int first_unit = int(rest % a.unit_tiles) * a.block_units;
  const int local_unit = a.lanes_are_units ? thread % a.block_units : thread / a.block_strips;
  const int slot = a.lanes_are_units ? thread / a.block_units : thread % a.block_strips;
  const int unit = first_unit + local_unit;

  const Tile biases{reinterpret_cast<acc_t*>(dynamic_shared()), a.block_units};
  const Tile tile{biases.data + Tile::entry_size(a.block_units), a.block_units};
  const Kernel kernel{a, tile, sample, first_unit};
  kernel.mix_biases(biases);
  if (a.chunks == 1) kernel.mix_kernels(Chunk(a, 0));
  __syncthreads();

  const storage_t* const from = static_cast<const storage_t*>(a.from) + sample * a.from_stride.batch +
                                int64_t(unit) * Kernel::kUnitGroups * a.depth * a.from_stride.channel;
  const int64_t first_strip = strip_tile * a.passes * a.block_strips;
  const int first_row = int(first_strip / a.columns.to), first_column = int(first_strip % a.columns.to);
  DYNCONV_NO_UNROLL
  for (int pass = 0; pass < a.passes; ++pass) {
    const int64_t pass_strip = first_strip + int64_t(pass) * a.block_strips;
    if (pass_strip >= a.strips) break;
    const bool exists = unit < a.units && pass_strip + slot < a.strips;
    const unsigned along = unsigned(first_column) + unsigned(pass * a.block_strips + slot);
    const unsigned down = along / unsigned(a.columns.to);
    const typename Kernel::Strip strip(a, exists ? first_row + int(down) : 0,
                                       exists ? int(along - down * unsigned(a.columns.to)) : 0);
    acc_t sums[kRows][Kernel::M], bias[Kernel::M];
    biases.read(0, local_unit, bias);
    DYNCONV_UNROLL
    for (int p = 0; p < kRows; ++p)
      DYNCONV_UNROLL
      for (int m = 0; m < Kernel::M; ++m) sums[p][m] = bias[m];
    DYNCONV_NO_UNROLL
    for (int number = 0; number < a.chunks; ++number) {
      const Chunk chunk(a, number);
      if (a.chunks > 1) {
        __syncthreads();
        kernel.mix_kernels(chunk);
        __syncthreads();
      }
      if (exists) kernel.accumulate(strip, from + chunk.first_channel * a.from_stride.channel, chunk, local_unit, sums);
    }
    if (exists) kernel.write(strip, unit, sums);
  }
}

// ------------------------------------------------------------------------------------------------------------- host

int power_of_two(int64_t least, int most) {
  int value = 1;
  while (value < most && value < least) value *= 2;
  return value;
}

// Cuts the work up. False if the depth can't be read in whole chunks.
template <class T, Reads reads, int R>
bool plan(DirectArguments* a, int64_t samples) {
  using Tile = typename DirectKernel<T, reads, R, 0, 0>::Tile;
  const int unit_groups = reads == Reads::groups ? T::kChunk : 1;
  a->units = a->groups / unit_groups;
  const int64_t strip_rows = a->rows.strips();
  a->strips = strip_rows * a->columns.to;
  if (a->lanes_are_units) {
    // 8 units of 16 bytes, or 32 numbers, fill lines of memory; more only where there are not strips enough.
    a->block_units = power_of_two(a->units, reads == Reads::numbers ? 32 : 8);
    a->block_strips = kThreads / a->block_units;
    while (a->block_units < 32 && a->block_units < a->units && a->block_strips / 2 >= a->strips)
      a->block_units *= 2, a->block_strips /= 2;
    a->block_strips = power_of_two(a->strips, a->block_strips);
  } else {
    a->block_strips = power_of_two(a->strips, kThreads);
    a->block_units = power_of_two(a->units, kThreads / a->block_strips < 32 ? kThreads / a->block_strips : 32);
  }
  a->unit_tiles = int(ceil_div(a->units, a->block_units));
  // Blocks are long, since each mixes kernels first, but 16 for each multiprocessor if there is work for them.
  const int64_t passes = ceil_div(a->strips, a->block_strips);
  const int64_t spare = samples * a->unit_tiles * passes / (int64_t(multiprocessors()) * 16);
  a->passes = int(spare < 1 ? 1 : spare > 16 ? 16 : spare);
  if (a->passes > passes) a->passes = int(passes);
  a->strip_tiles = ceil_div(passes, a->passes);

  const int taps = a->rows.kernel * a->columns.kernel;
  const int capacity = kSharedBytes / (Tile::entry_size(a->block_units) * int(sizeof(typename T::acc_t)));
  a->tap_chunk = taps < capacity ? taps : capacity;
  a->tap_chunks = int(ceil_div(taps, a->tap_chunk));
  a->depth_chunk = a->tap_chunks > 1 ? 1 : capacity / taps;
  if (a->depth_chunk > a->depth) a->depth_chunk = a->depth;
  if (reads == Reads::depth) a->depth_chunk = a->depth_chunk / T::kChunk * T::kChunk;
  if (a->depth_chunk == 0) return false;
  a->chunks = int(ceil_div(a->depth, a->depth_chunk)) * a->tap_chunks;
  return true;
}

template <class T, Reads reads, int R, int kTaps, int kStep>
cudaError_t launch_direct(const DirectArguments& a, int64_t samples, cudaStream_t stream) {
  using Tile = typename DirectKernel<T, reads, R, kTaps, kStep>::Tile;
  const int64_t entries = 1 + int64_t(a.depth_chunk) * a.tap_chunk;
  return launch(direct_kernel<T, reads, R, kTaps, kStep>, samples * a.unit_tiles * a.strip_tiles,
                a.block_units * a.block_strips,
                size_t(entries * Tile::entry_size(a.block_units) * int64_t(sizeof(typename T::acc_t))), stream, a);
}

// One output a group, where taps share what they read: 3x3 and 5x5 kernels with a stride of 1 or 2, without dilation.
template <class T, Reads reads>
cudaError_t run_single(const DirectArguments& a, int64_t samples, cudaStream_t stream) {
  const int taps = (a.rows.kernel + a.rows.step - 1) / a.rows.step, step = a.rows.strip_move;
  if (a.tap_chunks == 1 && (a.rows.tap_move == 1 || a.rows.tap_move == -1)) {
    if (taps == 2 && step == 1) return launch_direct<T, reads, 1, 2, 1>(a, samples, stream);
    if (taps == 3 && step == 1) return launch_direct<T, reads, 1, 3, 1>(a, samples, stream);
    if (taps == 5 && step == 1) return launch_direct<T, reads, 1, 5, 1>(a, samples, stream);
    if (taps == 3 && step == 2) return launch_direct<T, reads, 1, 3, 2>(a, samples, stream);
    if (taps == 5 && step == 2) return launch_direct<T, reads, 1, 5, 2>(a, samples, stream);
  }
  return launch_direct<T, reads, 1, 0, 0>(a, samples, stream);
}

template <class T, int R>
cudaError_t run_outputs(DirectArguments a, bool depth_vectors, int64_t samples, cudaStream_t stream) {
  using storage_t = typename T::storage_t;
  constexpr int64_t kBytes = R * int64_t(sizeof(storage_t));
  a.packed = a.to_stride.channel == 1 && a.outputs == R && is_aligned(a.to, kBytes < 16 ? kBytes : 16);
  if (depth_vectors && plan<T, Reads::depth, R>(&a, samples))
    return launch_direct<T, Reads::depth, R, 0, 0>(a, samples, stream);
  plan<T, Reads::numbers, R>(&a, samples);
  if constexpr (R == 1) return run_single<T, Reads::numbers>(a, samples, stream);
  else return launch_direct<T, Reads::numbers, R, 0, 0>(a, samples, stream);
}

// The rest of a is what plan() finds.
template <class T>
cudaError_t run_direct(DirectArguments a, int64_t samples, cudaStream_t stream) {
  a.lanes_are_units = a.from_stride.channel == 1;
  const bool vectors = a.lanes_are_units && is_aligned(a.from, 16);
  if (vectors && a.to_stride.channel == 1 && is_aligned(a.to, 16) && a.depth == 1 && a.outputs == 1 &&
      a.groups % T::kChunk == 0) {
    plan<T, Reads::groups, 1>(&a, samples);
    return run_single<T, Reads::groups>(a, samples, stream);
  }
  const bool depth_vectors = vectors && a.depth % T::kChunk == 0;
  if (a.outputs == 1) return run_outputs<T, 1>(a, depth_vectors, samples, stream);
  if (a.outputs == 2) return run_outputs<T, 2>(a, depth_vectors, samples, stream);
  if (a.outputs <= 4) return run_outputs<T, 4>(a, depth_vectors, samples, stream);
  return run_outputs<T, 8>(a, depth_vectors, samples, stream);
}

// What forward and grad_input share. The first dimension of a kernel has stride `row`, the second `taps`.
DirectArguments arguments(const DynamicCall& call, bool transposed) {
  const DynamicConv2dParams& p = call.params;
  const int64_t taps = p.taps(), row = p.group_channels() * taps, group = p.group_out_channels() * row;
  return {nullptr,
          {},
          nullptr,
          {},
          call.weight,
          nullptr,
          call.mix,
          int(p.bank.num_kernels),
          int(p.out_channels),
          p.bank.kernel_size(),
          group,
          transposed ? taps : row,
          transposed ? row : taps,
          int(p.groups),
          int(transposed ? p.group_out_channels() : p.group_channels()),
          int(transposed ? p.group_channels() : p.group_out_channels()),
          Axis(p.kernel_height, p.stride_height, p.padding_height, p.dilation_height, p.height, p.out_height,
               transposed),
          Axis(p.kernel_width, p.stride_width, p.padding_width, p.dilation_width, p.width, p.out_width, transposed),
          false, false, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
}

}  // namespace

template <class T>
cudaError_t run_direct_forward(const DynamicCall& call, void* out, cudaStream_t stream) {
  const DynamicConv2dParams& p = call.params;
  DirectArguments a = arguments(call, false);
  a.from = call.input;
  a.from_stride = image_strides(p.channels, p.height, p.width, p.channels_last);
  a.to = out;
  a.to_stride = image_strides(p.out_channels, p.out_height, p.out_width, p.channels_last);
  a.bias = call.bias;
  return run_direct<Exact<T>>(a, p.batch, stream);
}

template <class T>
cudaError_t run_direct_grad_input(const DynamicBackwardCall& call, cudaStream_t stream) {
  const DynamicConv2dParams& p = call.forward.params;
  DirectArguments a = arguments(call.forward, true);
  a.from = call.grad_out;
  a.from_stride = image_strides(p.out_channels, p.out_height, p.out_width, call.grad_out_channels_last);
  a.to = call.gradients.input;
  a.to_stride = image_strides(p.channels, p.height, p.width, p.channels_last);
  return run_direct<Exact<T>>(a, p.batch, stream);
}

#define DYNCONV_INSTANTIATE(...)                                                               \
  template cudaError_t run_direct_forward<__VA_ARGS__>(const DynamicCall&, void*, cudaStream_t); \
  template cudaError_t run_direct_grad_input<__VA_ARGS__>(const DynamicBackwardCall&, cudaStream_t);
DYNCONV_FOR_EACH_TYPES(DYNCONV_INSTANTIATE)
#undef DYNCONV_INSTANTIATE

}  // namespace dynamic_cuda
}  // namespace dynconv
