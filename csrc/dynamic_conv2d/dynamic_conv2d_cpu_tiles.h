// SPDX-License-Identifier: BSD-3-Clause
// dynamic_conv2d on the CPU by tiles: a small block of the bank (output channels x a chunk of input channels) is mixed
// for a few samples while it is in the cache, multiplied with those samples' columns, and forgotten. A sample's kernel
// is never whole in memory, and in the backward pass neither is its gradient.
//
//   tile     some pixels of one sample, or all pixels of some samples
//   chunk    some channels of a group; with the taps, the rows of the columns
//   panel    one or two vectors of pixels: what the innermost loop multiplies
//
// tile_t is what the products multiply: acc_t, or bfloat16 where the CPU does that itself (common/matmul_bfloat16.h). Mixed
// kernels are then rounded to bfloat16 once; sums are float32 everywhere.
#pragma once

#include "dynamic_conv2d/dynamic_conv2d_cpu.h"

namespace dynconv {

// Whether tiles are in matmul_pairs' layouts.
template <class tile_t>
constexpr bool kPairs = sizeof(tile_t) == 2;

// Most weights of a row of a mixed block.
constexpr int64_t kMostRows = 336;

// Output channels that are mixed at once: many for few samples, fewer for many, so that all their mixed blocks and the
// columns fit a core's second-level cache.
constexpr int64_t kTileChannels = 32, kTileChannelsManySamples = 16, kManySamples = 9;
static_assert(kTileChannels == kPairDepth);
// Columns of a tile: rows of about this many weights times about this many pixels stay in a core's second-level cache.
constexpr int64_t kTileRows = 288, kTilePixels = 512;
// Output channels that a thread takes at once, at most: their sums should stay in the cache, too.
constexpr int64_t kMostChannels = 256;
// Samples that share a block of the bank.
constexpr int64_t kMostSamples = 16;
// A chunk of an image with its padding, at most: tiles of larger images would leave the cache, and 32-bit offsets.
constexpr int64_t kMostPaddedBytes = 64 * 1024 * 1024;

// The least odd number of cache lines that holds count elements, in elements.
template <class T>
int64_t odd_lines(int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  return (ceil_div(count, line) / 2 * 2 + 1) * line;
}

// Whether a channel's taps fit a chunk, and a padded chunk has a bearable size.
inline bool tiles_fit(const DynamicConv2dParams& p) {
  const int64_t channels = std::max<int64_t>(1, std::min(p.group_channels(), kTileRows / p.taps()));
  const double padded = double(p.height + 2 * p.padding_height) * double(p.width + 2 * p.padding_width);
  return p.taps() <= kMostRows && padded * double(channels) * 8 <= kMostPaddedBytes;
}

// How a call is cut.
template <class tile_t>
struct TileSchedule {
  static constexpr bool pairs = kPairs<tile_t>;
  // What rows of columns and output channels are rounded up to where they are the depth of a product, and its rows.
  static constexpr int64_t depth_step = pairs ? kPairDepth : 1, row_step = pairs ? kPairRows : 1;

  int64_t threads, lanes, panel;
  int64_t chunk_channels, chunks;      // chunks of a group
  int64_t rows, padded_rows;           // of a whole chunk's columns; padded to two vectors
  int64_t samples, sample_blocks;      // samples of a tile
  int64_t tile_channels, tile_kernels; // output channels mixed at once; size of one sample's block of them
  int64_t kernel_row;                  // distance of its rows
  int64_t tile_pixels, tiles;          // pixels of a tile, a multiple of panel; tiles of a sample
  int64_t grad_row, tile_grads;        // distance of the rows of a tile of grad_out; size of one sample's
  int64_t padded_height, padded_width;

  TileSchedule(const DynamicConv2dParams& p, int64_t vector_lanes)
      : threads(std::max<int64_t>(1, torch::stable::get_num_threads())), lanes(vector_lanes) {
    panel = pairs || p.out_pixels() <= lanes ? lanes : 2 * lanes;
    chunk_channels = std::max<int64_t>(1, kTileRows / p.taps());
    if (chunk_channels > lanes) chunk_channels = chunk_channels / lanes * lanes;
    chunk_channels = std::min(chunk_channels, p.group_channels());
    chunks = ceil_div(p.group_channels(), chunk_channels);
    rows = chunk_channels * p.taps();
    padded_rows = round_up(rows, 2 * lanes);
    const int64_t pixels = round_up(p.out_pixels(), panel);
    tiles = ceil_div(pixels, kTilePixels);
    tile_pixels = round_up(ceil_div(pixels, tiles), panel);
    tiles = ceil_div(p.out_pixels(), tile_pixels);
    samples = tiles > 1 ? 1 : std::clamp<int64_t>(kTilePixels / pixels, 1, std::min(kMostSamples, p.batch));
    if (samples > 4) samples = samples / 4 * 4;  // mixed in fours
    tile_channels = pairs || samples < kManySamples ? kTileChannels : kTileChannelsManySamples;
    // An odd number of cache lines, so that equal positions of several rows don't fall into one set of the cache.
    kernel_row = odd_lines<tile_t>(round_up(rows, depth_step));
    tile_kernels = std::max(tile_channels * kernel_row, pairs ? turned_size() : 0);
    sample_blocks = ceil_div(p.batch, samples);
    grad_row = odd_lines<tile_t>(round_up(tile_pixels, 2 * lanes));
    tile_grads = tile_channels * grad_row;
    padded_height = p.height + 2 * p.padding_height;
    padded_width = p.width + 2 * p.padding_width;
  }

  // A block of a kernel turned over, (weight, output channel), and the run of it that is mixed at once.
  static constexpr int64_t kTurnedRun = 48 * kPairDepth;
  int64_t turned_size() const { return odd_lines<tile_t>(round_up(rows * kPairDepth, kTurnedRun)); }
};

template <class storage_t, class acc_t, class tile_t>
class DynamicTiles {
 public:
  DynamicTiles(const DynamicConv2dParams& params, const DynamicTensors<storage_t>& tensors, const acc_t* mix)
      : p(params),
        t(tensors),
        k(dynamic_tile_kernels<storage_t, acc_t, tile_t>()),
        mix_(mix),
        s(params, k.lanes),
        row_offset_(s.padded_rows + 2 * s.lanes) {}

  void forward(storage_t* out) {
    out_ = out;
    // Rows of the padded image that a tile's taps reach.
    const int64_t tile_height = std::min(p.out_height, (s.tile_pixels + p.out_width - 2) / p.out_width + 1);
    image_rows_ = std::min(s.padded_height,
                           (tile_height - 1) * p.stride_height + (p.kernel_height - 1) * p.dilation_height + 1);
    set_row_offsets();
    if (t.bias) {
      bias_ = Buffer<acc_t>(p.batch * p.out_channels);
      for (int64_t n = 0; n < p.batch; ++n)
        mix_bias(p.bank, t.bias, mix_ + n * p.bank.num_kernels, bias_.data() + n * p.out_channels);
    }
    // Output channels are shared out where samples and pixels alone leave threads idle.
    const int64_t blocks = ceil_div(p.group_out_channels(), s.tile_channels), others = s.sample_blocks * s.tiles * p.groups;
    const int64_t ranges = std::min(blocks, std::max(ceil_div(s.threads, others), ceil_div(p.group_out_channels(), kMostChannels)));
    const int64_t range = ceil_div(blocks, ranges) * s.tile_channels;
    const int64_t range_count = ceil_div(p.group_out_channels(), range);
    torch::stable::parallel_for(0, others * range_count, 1, [&](int64_t begin, int64_t end) {
      ForwardScratch scratch(*this, range);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t kernels = i / s.tiles, first = kernels % range_count * range, rest = kernels / range_count;
        forward_tile(scratch, rest / p.groups, i % s.tiles, rest % p.groups, first,
                     std::min(range, p.group_out_channels() - first), i == begin || i % s.tiles == 0);
      }
    });
  }

  void backward(const DynamicGradients<storage_t, acc_t>& wanted) {
    wanted_ = wanted;
    if (!wanted.input && !wanted.weight && !wanted.mix) return;
    image_rows_ = s.padded_height;
    set_row_offsets();
    // All pixels of a sample; tiles take their part of the table.
    pixel_offset_ = Buffer<int32_t>(s.tiles * s.tile_pixels + 2 * s.lanes);
    set_pixel_offsets(pixel_offset_.data(), 0, p.out_pixels(), pixel_offset_.size(), 0);
    // Chunks of channels are shared out; with fewer chunks than threads samples as well, each part with sums of its own.
    const int64_t size = p.bank.num_kernels * p.bank.kernel_size(), chunks = p.groups * s.chunks;
    const int64_t parts = std::min(s.sample_blocks, ceil_div(s.threads, chunks));
    const int64_t part_blocks = ceil_div(s.sample_blocks, parts), kernels = p.bank.num_kernels;
    // A part that is alone keeps a chunk's sums in the thread's scratch memory, if the tensor is of another type.
    local_sums_ = wanted.weight && parts == 1 && !std::is_same_v<storage_t, acc_t>;
    GradBank<storage_t, acc_t> grad_bank(local_sums_ ? nullptr : wanted.weight, size);
    Buffer<acc_t> part_sums(wanted.weight ? (parts - 1) * size : 0);
    BlockDots<acc_t> dots(wanted.mix != nullptr, chunks, p.batch * kernels);
    torch::stable::parallel_for(0, parts * chunks, 1, [&](int64_t begin, int64_t end) {
      BackwardScratch scratch(*this);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t chunk = i % chunks, part = i / chunks;
        scratch.sums = part == 0 ? grad_bank.sums() : wanted.weight ? part_sums.data() + (part - 1) * size : nullptr;
        scratch.dots = dots.of(chunk);
        backward_chunk(scratch, chunk / s.chunks, chunk % s.chunks * s.chunk_channels, part * part_blocks * s.samples,
                       std::min(p.batch, (part + 1) * part_blocks * s.samples));
      }
    });
    if (wanted.mix) dots.add_to(wanted.mix, p.batch * kernels);
    if (wanted.weight && !local_sums_ && (parts > 1 || !std::is_same_v<storage_t, acc_t>))
      torch::stable::parallel_for(0, ceil_div(size, kBankBlock), 4, [&](int64_t begin, int64_t end) {
        const int64_t from = begin * kBankBlock, to = std::min(size, end * kBankBlock);
        // A part may have got no samples: the last ones when blocks don't divide evenly.
        for (int64_t part = 1; part < parts && part * part_blocks < s.sample_blocks; ++part) {
          const acc_t* sums = part_sums.data() + (part - 1) * size;
          for (int64_t i = from; i < to; ++i) grad_bank.sums()[i] += sums[i];
        }
        grad_bank.finish(k.from_acc, from, to);
      });
  }

 private:
  // ------------------------------------------------------------------------------------------------ geometry, packing

  void set_row_offsets() {
    int32_t* offset = row_offset_.data();
    row_offset_.zero();
    for (int64_t c = 0; c < s.chunk_channels; ++c)
      for (int64_t i = 0; i < p.kernel_height; ++i)
        for (int64_t j = 0; j < p.kernel_width; ++j)
          *offset++ = int32_t((c * image_rows_ + i * p.dilation_height) * s.padded_width + j * p.dilation_width);
  }

  // Of pixels [begin, begin + count) in a padded image that starts at first_row; zero behind them up to size.
  void set_pixel_offsets(int32_t* offset, int64_t begin, int64_t count, int64_t size, int64_t first_row) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = (begin + i) / p.out_width, column = (begin + i) % p.out_width;
      offset[i] = int32_t((row * p.stride_height - first_row) * s.padded_width + column * p.stride_width);
    }
    std::fill(offset + count, offset + size, 0);
  }

  int64_t image_size() const { return s.chunk_channels * image_rows_ * s.padded_width; }

  // Channels [first, first + channels) of a sample of input or its gradient.
  ImageChunk<storage_t> image_chunk(const storage_t* data, int64_t n, int64_t first, int64_t channels) const {
    const int64_t pixels = p.in_pixels();
    const storage_t* image = data + n * p.channels * pixels + first * (p.channels_last ? 1 : pixels);
    return {image, channels, p.height, p.width, p.channels_last ? 1 : pixels, p.channels_last ? p.channels : 1,
            image_rows_ * s.padded_width, s.padded_width, p.padding_width};
  }

  // Output channels [o, o + rows) of all groups' count, and the chunk's weights of them.
  BankBlock<storage_t> bank_block(int64_t o, int64_t rows, int64_t first_channel, int64_t count) const {
    return {t.weight + o * p.bank.row + first_channel * p.taps(), p.bank.num_kernels, p.bank.kernel_size(), rows,
            p.bank.row, count};
  }

  // ---------------------------------------------------------------------------------------------------------- forward

  // Results go to the tensor itself where it is of the sums' type and layout.
  bool direct() const { return std::is_same_v<storage_t, acc_t> && !p.channels_last; }

  // Whether the mixed kernels stay for the next tile: those of a sample with several tiles, if they are in one chunk.
  bool keep_mixed() const { return s.tiles > 1 && s.chunks == 1; }

  using Unit = ProductUnit<kPairs<tile_t>>;

  struct ForwardScratch {
    [[maybe_unused]] Unit unit;
    Buffer<acc_t> image, sums;
    Buffer<tile_t> columns, kernels;
    Buffer<int32_t> pixel_offset;

    ForwardScratch(const DynamicTiles& call, int64_t range)
        : image(call.image_size()),
          sums(call.direct() ? 0 : call.s.samples * round_up(range, call.s.row_step) * call.s.tile_pixels),
          columns(call.s.samples * call.s.padded_rows * call.s.tile_pixels),
          kernels(call.s.samples * call.s.tile_kernels *
                  (call.keep_mixed() ? ceil_div(range, call.s.tile_channels) : 1)),
          pixel_offset(call.s.tile_pixels) {
      image.zero();
    }
  };

  // Output channels [first_out, first_out + outs) of a group, for a tile; first: of these kernels.
  void forward_tile(ForwardScratch& x, int64_t block, int64_t tile, int64_t group, int64_t first_out, int64_t outs,
                    bool first) {
    const int64_t n0 = block * s.samples, samples = std::min(s.samples, p.batch - n0);
    const int64_t begin = tile * s.tile_pixels, count = std::min(s.tile_pixels, p.out_pixels() - begin);
    const int64_t taps = p.taps(), o0 = group * p.group_out_channels() + first_out;
    const int64_t first_row = begin / p.out_width * p.stride_height;
    const int64_t last_row = (begin + count - 1) / p.out_width * p.stride_height +
                             (p.kernel_height - 1) * p.dilation_height;
    const int64_t used = round_up(count, s.panel), sample_sums = round_up(outs, s.row_step) * used;
    set_pixel_offsets(x.pixel_offset.data(), begin, count, s.tile_pixels, first_row);
    for (int64_t c0 = 0; c0 < p.group_channels(); c0 += s.chunk_channels) {
      const int64_t channels = std::min(s.chunk_channels, p.group_channels() - c0), rows = channels * taps;
      const int64_t depth = round_up(rows, s.depth_step);
      const ColumnPlan plan{row_offset_.data(), x.pixel_offset.data(), rows, count, s.panel, depth};
      for (int64_t i = 0; i < samples; ++i) {
        k.pack_rows(image_chunk(t.input, n0 + i, group * p.group_channels() + c0, channels),
                    first_row - p.padding_height, last_row + 1 - p.padding_height, x.image.data());
        k.make_columns(x.image.data(), plan, x.columns.data() + i * depth * used);
      }
      for (int64_t o = 0; o < outs; o += s.tile_channels) {
        const int64_t tile_outs = std::min(s.tile_channels, outs - o);
        tile_t* kernels = x.kernels.data() + (keep_mixed() ? o / s.tile_channels * s.tile_kernels : 0);
        if (first || !keep_mixed()) {
          k.mix(bank_block(o0 + o, tile_outs, c0, rows), mix_ + n0 * p.bank.num_kernels, samples, kernels,
                s.tile_kernels, s.kernel_row);
          if (depth > rows) clear_tails(kernels, samples, tile_outs, rows, depth);
        }
        for (int64_t i = 0; i < samples; ++i) {
          acc_t* c;
          int64_t c_row;
          if (direct()) {
            c = reinterpret_cast<acc_t*>(out_) + ((n0 + i) * p.out_channels + o0 + o) * p.out_pixels() + begin;
            c_row = p.out_pixels();
          } else {
            c = x.sums.data() + i * sample_sums + o * used;
            c_row = used;
          }
          const acc_t* start = c0 == 0 && t.bias ? bias_.data() + (n0 + i) * p.out_channels + o0 + o : nullptr;
          k.matmul({tile_outs, count, depth, kernels + i * s.tile_kernels, s.kernel_row, 1,
                    x.columns.data() + i * used * depth, s.panel, s.panel * depth, true, c, c_row, c0 > 0, start});
        }
      }
    }
    if (direct()) return;
    for (int64_t i = 0; i < samples; ++i) {
      storage_t* out = out_ + (n0 + i) * p.out_channels * p.out_pixels();
      if (p.channels_last)
        k.write_rows(x.sums.data() + i * sample_sums, used, out + begin * p.out_channels + o0, 1, p.out_channels, outs,
                     count);
      else
        k.write_rows(x.sums.data() + i * sample_sums, used, out + o0 * p.out_pixels() + begin, p.out_pixels(), 1, outs,
                     count);
    }
  }

  // Weights [rows, depth) of mixed blocks.
  void clear_tails(tile_t* kernels, int64_t samples, int64_t outs, int64_t rows, int64_t depth) const {
    for (int64_t i = 0; i < samples; ++i)
      for (int64_t o = 0; o < outs; ++o) {
        tile_t* row = kernels + i * s.tile_kernels + o * s.kernel_row;
        std::fill(row + rows, row + depth, tile_t{});
      }
  }

  // --------------------------------------------------------------------------------------------------------- backward

  struct BackwardScratch {
    [[maybe_unused]] Unit unit;
    Buffer<acc_t> image, grad_image, grad_columns, grad_kernels;
    Buffer<tile_t> columns, grad_panels, grad_rows, kernels;
    Buffer<tile_t> turned;     // (output channels, K, weight, output channel), for pairs
    Buffer<acc_t> local_sums;  // (K, output channel of the group, weight of the chunk)
    Buffer<acc_t> dot_lanes;   // (sample of the tile, K, lane)
    acc_t* sums = nullptr;     // of the bank's gradient, (K, O, row)
    acc_t* dots = nullptr;     // (N, K)

    explicit BackwardScratch(const DynamicTiles& call) {
      const auto& s = call.s;
      const bool want_kernel = call.wanted_.weight || call.wanted_.mix;
      if (call.wanted_.mix) dot_lanes = Buffer<acc_t>(s.samples * call.p.bank.num_kernels * s.lanes);
      dot_lanes.zero();
      if (want_kernel) {
        image = Buffer<acc_t>(call.image_size());
        image.zero();
        columns = Buffer<tile_t>(s.samples * s.padded_rows * round_up(s.tile_pixels, s.depth_step));
        grad_rows = Buffer<tile_t>(s.tile_grads);
        // With several tiles, sums over them.
        grad_kernels = Buffer<acc_t>(
            (s.tiles > 1 ? round_up(call.p.group_out_channels(), s.row_step) : s.samples * s.tile_channels) *
            s.padded_rows);
      }
      if (call.local_sums_)
        local_sums = Buffer<acc_t>(call.p.bank.num_kernels * call.p.group_out_channels() * s.rows);
      if (call.wanted_.input) {
        grad_panels = Buffer<tile_t>(s.tile_grads);
        grad_image = Buffer<acc_t>(call.image_size());
        grad_columns = Buffer<acc_t>(s.samples * s.padded_rows * s.tile_pixels);
        kernels = Buffer<tile_t>(s.samples * s.tile_kernels);
        if (s.pairs)
          turned = Buffer<tile_t>((call.keep_turned() ? ceil_div(call.p.group_out_channels(), s.tile_channels) : 1) *
                                  call.p.bank.num_kernels * s.turned_size());
      }
    }
  };

  // Channels from c0 of a group, for samples [begin, end).
  void backward_chunk(BackwardScratch& x, int64_t group, int64_t c0, int64_t begin, int64_t end) {
    const int64_t channels = std::min(s.chunk_channels, p.group_channels() - c0);
    for (int64_t n0 = begin; n0 < end; n0 += s.samples)
      for (int64_t tile = 0; tile < s.tiles; ++tile)
        backward_tile(x, group, c0, channels, n0, std::min(s.samples, end - n0), tile, n0 == begin);
    if (!local_sums_) return;
    const int64_t outs = p.group_out_channels(), count = channels * p.taps();
    for (int64_t j = 0; j < p.bank.num_kernels; ++j)
      for (int64_t o = 0; o < outs; ++o)
        k.from_acc(x.local_sums.data() + (j * outs + o) * s.rows,
                   wanted_.weight + (j * p.out_channels + group * outs + o) * p.bank.row + c0 * p.taps(), count);
  }

  // Where a block's sums over samples go.
  BankSums<acc_t> sums_of(const BackwardScratch& x, const BankBlock<storage_t>& bank, int64_t o) const {
    if (local_sums_) return {x.local_sums.data() + o * s.rows, p.group_out_channels() * s.rows, s.rows};
    return {x.sums ? x.sums + (bank.data - t.weight) : nullptr, bank.kernel_stride, bank.row_stride};
  }

  void backward_tile(BackwardScratch& x, int64_t group, int64_t c0, int64_t channels, int64_t n0, int64_t samples,
                     int64_t tile, bool first_samples) {
    const bool want_kernel = wanted_.weight || wanted_.mix, last_tile = tile == s.tiles - 1;
    const int64_t begin = tile * s.tile_pixels, count = std::min(s.tile_pixels, p.out_pixels() - begin);
    const int64_t rows = channels * p.taps(), first_channel = group * p.group_channels() + c0;
    const int64_t padded_rows = round_up(rows, s.row_step), depth = round_up(count, s.depth_step);
    const ColumnPlan plan{row_offset_.data(), pixel_offset_.data() + begin, rows, count, s.panel, padded_rows};
    const int64_t columns_size = s.padded_rows * round_up(s.tile_pixels, s.depth_step);
    const int64_t grad_columns_size = s.padded_rows * s.tile_pixels;
    for (int64_t i = 0; want_kernel && i < samples; ++i) {
      if (tile == 0)
        k.pack_rows(image_chunk(t.input, n0 + i, first_channel, channels), -p.padding_height,
                    p.height + p.padding_height, x.image.data());
      k.make_transposed_columns(x.image.data(), plan, x.columns.data() + i * columns_size);
    }
    const acc_t* a = mix_ + n0 * p.bank.num_kernels;
    const int64_t outs = p.group_out_channels(), row_panel = kPairs<tile_t> ? kPairPanel : 2 * s.lanes;
    for (int64_t o = 0; o < outs; o += s.tile_channels) {
      const int64_t tile_outs = std::min(s.tile_channels, outs - o), first_out = group * outs + o;
      const auto bank = bank_block(first_out, tile_outs, c0, rows);
      if (wanted_.input) {
        const auto mixed = mixed_block(x, bank, o, first_samples && tile == 0);
        k.mix(mixed, a, samples, x.kernels.data(), s.tile_kernels, kPairs<tile_t> ? mixed.count : s.kernel_row);
        for (int64_t i = 0; i < samples; ++i)
          add_grad_columns(x, n0 + i, first_out, tile_outs, rows, begin, count, x.kernels.data() + i * s.tile_kernels,
                           x.grad_columns.data() + i * grad_columns_size, o > 0);
      }
      if (!want_kernel) continue;
      acc_t* grads = x.grad_kernels.data() + (s.tiles > 1 ? o * s.padded_rows : 0);
      const int64_t grad_size = s.tile_channels * s.padded_rows;
      for (int64_t i = 0; i < samples; ++i) {
        pack_grad_out(n0 + i, first_out, tile_outs, begin, count, s.grad_row, x.grad_rows.data());
        k.matmul({tile_outs, rows, depth, x.grad_rows.data(), s.grad_row, 1, x.columns.data() + i * columns_size,
                  row_panel, row_panel * depth, true, grads + i * grad_size, s.padded_rows, tile > 0});
      }
      if (last_tile)
        k.unmix(bank, grads, grad_size, s.padded_rows, a, samples, sums_of(x, bank, o), !first_samples,
                x.dot_lanes.data());
    }
    if (last_tile && x.dots)
      k.add_lanes(x.dot_lanes.data(), samples * p.bank.num_kernels, x.dots + n0 * p.bank.num_kernels);
    for (int64_t i = 0; wanted_.input && i < samples; ++i) {
      if (tile == 0) x.grad_image.zero();
      k.add_columns(x.grad_columns.data() + i * grad_columns_size, plan, x.grad_image.data());
      if (last_tile)
        k.unpack_rows(x.grad_image.data(), p.padding_height,
                      image_chunk(wanted_.input, n0 + i, first_channel, channels));
    }
  }

  // Whether blocks of the bank are needed again for other samples or pixels.
  bool keep_turned() const { return s.sample_blocks > 1 || s.tiles > 1; }

  // What is mixed for the gradient of input. For pairs the bank's block turned over, (weight, output channel), once for
  // all samples: the product wants the mixed kernels thus.
  BankBlock<storage_t> mixed_block(BackwardScratch& x, const BankBlock<storage_t>& bank, int64_t o, bool first_pass) {
    if constexpr (!kPairs<tile_t>) {
      return bank;
    } else {
      const int64_t size = s.turned_size(), run = s.kTurnedRun, kernels = p.bank.num_kernels;
      tile_t* turned = x.turned.data() + (keep_turned() ? o / s.tile_channels * kernels * size : 0);
      for (int64_t j = 0; first_pass && j < kernels; ++j)
        k.turn_over(bank.data + j * bank.kernel_stride, bank.row_stride, bank.rows, bank.count, turned + j * size);
      return {turned, kernels, size, ceil_div(bank.count * kPairDepth, run), run, run};
    }
  }

  // Columns of a sample's grad_input (+)= its transposed mixed kernels times grad_out, for a block of output channels.
  void add_grad_columns(BackwardScratch& x, int64_t n, int64_t first_out, int64_t outs, int64_t rows, int64_t begin,
                        int64_t count, const tile_t* kernels, acc_t* columns, bool accumulate) {
    const int64_t depth = round_up(outs, s.depth_step);
    pack_grad_out(n, first_out, outs, begin, count, s.panel, x.grad_panels.data());
    k.matmul({rows, count, depth, kernels, kPairs<tile_t> ? kPairDepth : 1, kPairs<tile_t> ? 1 : s.kernel_row,
              x.grad_panels.data(), s.panel, s.panel * depth, true, columns, s.panel, accumulate, nullptr,
              s.panel * round_up(rows, s.row_step)});
  }

  // Pixels [begin, begin + count) of output channels [o, o + outs) in panels, zero behind the last: one long panel is
  // rows, the left factor of a product, panels of s.panel are its right one.
  void pack_grad_out(int64_t n, int64_t o, int64_t outs, int64_t begin, int64_t count, int64_t panel,
                     tile_t* panels) const {
    const int64_t pixels = p.out_pixels();
    const storage_t* from = t.grad_out + n * p.out_channels * pixels;
    int64_t row_stride = pixels, pixel_stride = 1;
    if (t.grad_out_channels_last) {
      from += begin * p.out_channels + o;
      row_stride = 1;
      pixel_stride = p.out_channels;
    } else {
      from += o * pixels + begin;
    }
    if (kPairs<tile_t> && panel == s.panel)
      k.make_pair_panels(from, row_stride, pixel_stride, outs, round_up(outs, s.depth_step), count, panels);
    else
      k.make_panels(from, row_stride, pixel_stride, outs, count, panel, panels);
  }

  const DynamicConv2dParams& p;
  const DynamicTensors<storage_t>& t;
  const DynamicTileKernels<storage_t, acc_t, tile_t>& k;
  const acc_t* mix_;
  const TileSchedule<tile_t> s;
  int64_t image_rows_ = 0;
  Buffer<int32_t> row_offset_, pixel_offset_;
  Buffer<acc_t> bias_;
  storage_t* out_ = nullptr;
  bool local_sums_ = false;
  DynamicGradients<storage_t, acc_t> wanted_{};
};

}  // namespace dynconv
