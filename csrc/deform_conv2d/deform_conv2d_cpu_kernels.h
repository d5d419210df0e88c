// SPDX-License-Identifier: BSD-3-Clause
// Loops of deform_conv2d that run per instruction set: included by foreach_cpu_level.h inside a namespace, after simd.inl.
//
// An image is (pixel, channel), channels fastest, so that one tap's coordinates and weights serve a run of channels.
// Columns of a tile are (group, pixel, tap, channel of the group): what the matrix product with the weight reads.

#include "common/matmul.inl"
#include "common/rows.inl"
#if defined(DYNCONV_AVX512_BF16)
#include "common/pairs.inl"
#endif
#include "deform_conv2d/deform_conv2d_math.h"

// A strip is a run of output pixels, one a lane, of one offset group. Its taps are located at once; then a block of
// channels, small enough that what the strip samples stays in the first-level cache, is read tap by tap.
template <class acc_t, class storage_t>
struct DeformTap {
  static constexpr int64_t lanes = Simd<acc_t>::lanes;
  const storage_t* corner[lanes][4];  // the zero row for one outside the image
  acc_t weight[4][lanes];             // mask included
  acc_t fraction_y[lanes], fraction_x[lanes], mask[lanes];
  typename Simd<acc_t>::int_t valid[lanes];  // bit j: corner j lies in the image
};

constexpr int64_t kBlockBytes = 256;

// Scalars at address + lane * stride for the first count lanes, 0 behind them.
template <class acc_t>
DYNCONV_INLINE Vec<acc_t> read_lanes(const ScalarReader<acc_t>& reader, const int64_t* address, int64_t count,
                                     bool dense) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  if (dense && sizeof(acc_t) == sizeof(float) && reader.type == StorageType::float32)
    return load(static_cast<const acc_t*>(reader.data) + address[0]);
  acc_t values[lanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = reader[address[i]];
  return load(values);
}

// Locates every tap of one offset group for output pixels [begin, begin + count), count <= lanes; pixel i in lane i.
template <class acc_t, class storage_t>
DYNCONV_INLINE void locate_strip(const DeformConv2dParams& p, const DeformImage<storage_t>& image,
                                 const ScalarReader<acc_t>& offset, const ScalarReader<acc_t>& mask, int64_t n,
                                 int64_t group, int64_t begin, int64_t count, DeformTap<acc_t, storage_t>* taps) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  typedef typename Simd<acc_t>::int_t int_t;
  typedef typename Simd<acc_t>::int_vec int_vec;
  int64_t at_offset[lanes], at_mask[lanes];
  acc_t first_y[lanes] = {}, first_x[lanes] = {};
  bool dense_offset = count == lanes, dense_mask = count == lanes;
  int64_t row = begin / p.out_width, column = begin - row * p.out_width;
  for (int64_t i = 0; i < count; ++i) {
    at_offset[i] = n * p.offset_stride[0] + 2 * group * p.taps() * p.offset_stride[1] + row * p.offset_stride[2] +
                   column * p.offset_stride[3];
    at_mask[i] =
        n * p.mask_stride[0] + group * p.taps() * p.mask_stride[1] + row * p.mask_stride[2] + column * p.mask_stride[3];
    dense_offset &= at_offset[i] == at_offset[0] + i;
    dense_mask &= at_mask[i] == at_mask[0] + i;
    first_y[i] = acc_t(row * p.stride_height - p.padding_height);
    first_x[i] = acc_t(column * p.stride_width - p.padding_width);
    if (++column == p.out_width) column = 0, ++row;
  }
  const Vec<acc_t> base_y = load(first_y), base_x = load(first_x), none = {};
  const Vec<acc_t> height = none + acc_t(p.height), width = none + acc_t(p.width);
  const int64_t pixel_step = p.channels, row_step = p.width * p.channels;
  for (int64_t tap_row = 0, tap = 0; tap_row < p.kernel_height; ++tap_row)
    for (int64_t tap_column = 0; tap_column < p.kernel_width; ++tap_column, ++tap) {
      const Vec<acc_t> dy = read_lanes(offset, at_offset, count, dense_offset);
      for (int64_t i = 0; i < count; ++i) at_offset[i] += p.offset_stride[1];
      const Vec<acc_t> dx = read_lanes(offset, at_offset, count, dense_offset);
      for (int64_t i = 0; i < count; ++i) at_offset[i] += p.offset_stride[1];
      Vec<acc_t> m = none + 1;
      if (p.has_mask) {
        m = read_lanes(mask, at_mask, count, dense_mask);
        for (int64_t i = 0; i < count; ++i) at_mask[i] += p.mask_stride[1];
      }
      BilinearSample<Vec<acc_t>> s;
      const Vec<acc_t> y = base_y + acc_t(tap_row * p.dilation_height) + dy;
      const Vec<acc_t> x = base_x + acc_t(tap_column * p.dilation_width) + dx;
      const auto inside = bilinear_sample(y, x, height, width, &s);
      DeformTap<acc_t, storage_t>& out = taps[tap];
      for (int j = 0; j < 4; ++j) store(out.weight[j], s.weight[j] * m);
      store(out.fraction_y, s.fraction_y);
      store(out.fraction_x, s.fraction_x);
      store(out.mask, m);
      const int_vec top = __builtin_convertvector(s.top, int_vec), left = __builtin_convertvector(s.left, int_vec);
      const int_vec above = inside & (top >= 0), below = inside & (top + 1 < int_t(p.height));
      const int_vec west = left >= 0, east = left + 1 < int_t(p.width);
      const int_vec valid = (above & west & 1) | (above & east & 2) | (below & west & 4) | (below & east & 8);
      int_t tops[lanes], lefts[lanes];
      __builtin_memcpy(tops, &top, sizeof tops);
      __builtin_memcpy(lefts, &left, sizeof lefts);
      __builtin_memcpy(out.valid, &valid, sizeof valid);
      for (int64_t i = 0; i < count; ++i) {
        const storage_t* first = image.pixels + tops[i] * row_step + lefts[i] * pixel_step;
        out.corner[i][0] = out.valid[i] & 1 ? first : image.zero_row;
        out.corner[i][1] = out.valid[i] & 2 ? first + pixel_step : image.zero_row;
        out.corner[i][2] = out.valid[i] & 4 ? first + row_step : image.zero_row;
        out.corner[i][3] = out.valid[i] & 8 ? first + row_step + pixel_step : image.zero_row;
      }
    }
}

// Samples output pixels [begin, begin + count) of image n into columns of gemm_t. scratch: scratch_bytes of the kernels.
template <class storage_t, class acc_t, class gemm_t>
void sample_tile(const DeformConv2dParams& p, DeformImage<storage_t> image, ScalarReader<acc_t> offset,
                 ScalarReader<acc_t> mask, int64_t n, int64_t begin, int64_t count, ColumnLayout layout, void* scratch,
                 gemm_t* columns) {
  constexpr int64_t lanes = Simd<acc_t>::lanes, block = kBlockBytes / sizeof(acc_t);
  DeformTap<acc_t, storage_t>* located = static_cast<DeformTap<acc_t, storage_t>*>(scratch);
  const int64_t taps = p.taps(), offset_channels = p.channels / p.offset_groups;
  const int64_t group_channels = p.channels / layout.groups;
  for (int64_t strip = 0; strip < count; strip += lanes) {
    const int64_t pixels = count - strip < lanes ? count - strip : lanes;
    for (int64_t group = 0; group < p.offset_groups; ++group) {
      locate_strip(p, image, offset, mask, n, group, begin + strip, pixels, located);
      const int64_t last = (group + 1) * offset_channels;
      for (int64_t first = group * offset_channels; first < last;) {
        // A run of channels of one column group, at most a block.
        const int64_t column_group = first / group_channels, group_end = (column_group + 1) * group_channels;
        int64_t end = last < group_end ? last : group_end;
        end = end - first > block ? first + block : end;
        const int64_t whole = first + (end - first) / lanes * lanes, rest = end - whole;
        gemm_t* row = columns + column_group * (layout.group - group_channels) + strip * layout.row;
        for (int64_t i = 0; i < pixels; ++i, row += layout.row) {
          gemm_t* out = row;
          for (int64_t tap = 0; tap < taps; ++tap, out += group_channels) {
            // Copies: a store to columns might change the tap itself, for all that the compiler knows.
            const DeformTap<acc_t, storage_t>& t = located[tap];
            const storage_t *c0 = t.corner[i][0], *c1 = t.corner[i][1], *c2 = t.corner[i][2], *c3 = t.corner[i][3];
            const acc_t w0 = t.weight[0][i], w1 = t.weight[1][i], w2 = t.weight[2][i], w3 = t.weight[3][i];
            for (int64_t c = first; c < whole; c += lanes)
              store(out + c, (w0 * load(c0 + c) + w1 * load(c1 + c)) + (w2 * load(c2 + c) + w3 * load(c3 + c)));
            if (rest)
              store_partial<acc_t>(
                  out + whole,
                  (w0 * load_partial<acc_t>(c0 + whole, rest) + w1 * load_partial<acc_t>(c1 + whole, rest)) +
                      (w2 * load_partial<acc_t>(c2 + whole, rest) + w3 * load_partial<acc_t>(c3 + whole, rest)),
                  rest);
          }
        }
        first = end;
      }
    }
  }
}

// Takes the gradient of a tile's columns apart: into grad_input (H * W, C; null if not wanted), and grad_offset and
// grad_mask (contiguous; null data if not wanted).
template <class storage_t, class acc_t>
void scatter_tile(const DeformConv2dParams& p, DeformImage<storage_t> image, ScalarReader<acc_t> offset,
                  ScalarReader<acc_t> mask, int64_t n, int64_t begin, int64_t count, ColumnLayout layout,
                  void* scratch, const acc_t* grad_columns, acc_t* grad_input, ScalarWriter<acc_t> grad_offset,
                  ScalarWriter<acc_t> grad_mask) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  DeformTap<acc_t, storage_t>* located = static_cast<DeformTap<acc_t, storage_t>*>(scratch);
  const int64_t taps = p.taps(), offset_channels = p.channels / p.offset_groups;
  const int64_t group_channels = p.channels / layout.groups, pixels = p.out_pixels();
  const bool want_dots = grad_offset.data || grad_mask.data;
  for (int64_t strip = 0; strip < count; strip += lanes) {
    const int64_t strip_pixels = count - strip < lanes ? count - strip : lanes;
    for (int64_t group = 0; group < p.offset_groups; ++group) {
      locate_strip(p, image, offset, mask, n, group, begin + strip, strip_pixels, located);
      const int64_t last = (group + 1) * offset_channels;
      for (int64_t at = 0; at < strip_pixels * taps; ++at) {
        const int64_t lane = at / taps, tap = at - lane * taps, i = strip + lane;
        const DeformTap<acc_t, storage_t>& t = located[tap];
        const storage_t* const* corner = t.corner[lane];
        acc_t* target[4];
        acc_t weight[4];
        for (int j = 0; j < 4; ++j) {
          target[j] = grad_input && (t.valid[lane] >> j & 1) ? grad_input + (corner[j] - image.pixels) : nullptr;
          weight[j] = t.weight[j][lane];
        }
        Vec<acc_t> dots[4] = {};
        for (int64_t c = group * offset_channels; c < last;) {
          const int64_t column_group = c / group_channels, first = column_group * group_channels;
          const int64_t end = last < first + group_channels ? last : first + group_channels;
          const acc_t* grad = grad_columns + column_group * layout.group + i * layout.row + tap * group_channels - first;
          for (; c + lanes <= end; c += lanes) {
            const Vec<acc_t> g = load(grad + c);
            if (want_dots)
              for (int j = 0; j < 4; ++j) dots[j] += g * load(corner[j] + c);
            for (int j = 0; j < 4; ++j)
              if (target[j]) store(target[j] + c, load(target[j] + c) + weight[j] * g);
          }
          if (c < end) {
            const int64_t rest = end - c;
            const Vec<acc_t> g = load_partial<acc_t>(grad + c, rest);
            if (want_dots)
              for (int j = 0; j < 4; ++j) dots[j] += g * load_partial<acc_t>(corner[j] + c, rest);
            for (int j = 0; j < 4; ++j)
              if (target[j])
                store_partial<acc_t>(target[j] + c, load_partial<acc_t>(target[j] + c, rest) + weight[j] * g, rest);
            c = end;
          }
        }
        if (want_dots) {
          const acc_t dot[4] = {sum_lanes<acc_t>(dots[0]), sum_lanes<acc_t>(dots[1]), sum_lanes<acc_t>(dots[2]),
                                sum_lanes<acc_t>(dots[3])};
          acc_t grad_y, grad_x, grad_m;
          sample_gradients(t.fraction_y[lane], t.fraction_x[lane], dot, t.mask[lane], &grad_y, &grad_x, &grad_m);
          const int64_t channel = (n * p.offset_groups + group) * taps + tap, pixel = begin + i;
          if (grad_offset.data) {
            grad_offset.write(2 * channel * pixels + pixel, grad_y);
            grad_offset.write((2 * channel + 1) * pixels + pixel, grad_x);
          }
          if (grad_mask.data) grad_mask.write(channel * pixels + pixel, grad_m);
        }
      }
    }
  }
}

// out[pixel, c] = bias[c] + sum_tap columns[pixel, tap, c] * weight[tap, c]: a depthwise layer needs no matrix product.
template <class acc_t, class gemm_t>
void depthwise_tile(int64_t count, int64_t taps, int64_t channels, const gemm_t* columns, const acc_t* weight,
                    const acc_t* bias, acc_t* out) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < channels; c += lanes) {
      const int64_t rest = channels - c < lanes ? channels - c : lanes;
      const bool whole = rest == lanes;
      Vec<acc_t> sum = whole ? load(bias + c) : load_partial<acc_t>(bias + c, rest);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const gemm_t* column = columns + (i * taps + tap) * channels + c;
        const acc_t* w = weight + tap * channels + c;
        sum += whole ? load(w) * load(column) : load_partial<acc_t>(w, rest) * load_partial<acc_t>(column, rest);
      }
      if (whole) store(out + i * channels + c, sum);
      else store_partial<acc_t>(out + i * channels + c, sum, rest);
    }
}

// grad_columns = grad_out * weight and grad_weight += grad_out * columns of a depthwise layer; either may be null.
template <class acc_t, class gemm_t>
void depthwise_backward_tile(int64_t count, int64_t taps, int64_t channels, const acc_t* grad_out, const acc_t* weight,
                             const gemm_t* columns, acc_t* grad_columns, acc_t* grad_weight) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < channels; c += lanes) {
        const int64_t rest = channels - c < lanes ? channels - c : lanes;
        const int64_t at = (i * taps + tap) * channels + c, k = tap * channels + c;
        if (rest == lanes) {
          const Vec<acc_t> g = load(grad_out + i * channels + c);
          if (grad_columns) store(grad_columns + at, g * load(weight + k));
          if (grad_weight) store(grad_weight + k, load(grad_weight + k) + g * load(columns + at));
        } else {
          const Vec<acc_t> g = load_partial<acc_t>(grad_out + i * channels + c, rest);
          if (grad_columns) store_partial<acc_t>(grad_columns + at, g * load_partial<acc_t>(weight + k, rest), rest);
          if (grad_weight)
            store_partial<acc_t>(grad_weight + k,
                                 load_partial<acc_t>(grad_weight + k, rest) + g * load_partial<acc_t>(columns + at, rest),
                                 rest);
        }
      }
}

#if defined(DYNCONV_AVX512_BF16)
// As pack_panels of matmul.inl, for any number of columns.
inline void pack_pair_panels(const bfloat16* from, int64_t step, int64_t column_step, int64_t depth, int64_t columns,
                             bfloat16* to) {
  make_pair_panels(from, step, column_step, depth, (depth + kPairDepth - 1) / kPairDepth * kPairDepth, columns, to);
}
#endif

template <class storage_t, class acc_t, class gemm_t>
DeformKernels<storage_t, acc_t, gemm_t> deform_kernels() {
  DeformKernels<storage_t, acc_t, gemm_t> k{};
  k.scratch_bytes = sizeof(DeformTap<acc_t, storage_t>);
  k.sample_tile = &sample_tile<storage_t, acc_t, gemm_t>;
  k.scatter_tile = &scatter_tile<storage_t, acc_t>;
  k.depthwise_tile = &depthwise_tile<acc_t, gemm_t>;
  k.depthwise_backward_tile = &depthwise_backward_tile<acc_t, gemm_t>;
  if constexpr (std::is_same_v<gemm_t, acc_t>) {
    k.matmul = &matmul<acc_t>;
    k.pack_panels = &pack_panels<acc_t, acc_t>;
    k.panel = kPanel<acc_t>;
  } else {
#if defined(DYNCONV_AVX512_BF16)
    k.matmul = &matmul_pairs;
    k.pack_panels = &pack_pair_panels;
    k.panel = kPairPanel;
#endif
  }
  k.pack_image = &transpose<false, acc_t, storage_t, storage_t>;
  k.pack_weight = &transpose<false, acc_t, storage_t, gemm_t>;
  k.unpack_image = &transpose<true, acc_t, acc_t, storage_t>;
  k.pack_grad_out = &transpose<false, acc_t, storage_t, acc_t>;
  k.to_storage = &convert_row<acc_t, acc_t, storage_t>;
  k.to_acc = &convert_row<acc_t, storage_t, acc_t>;
  k.add_acc_row = &add_row<acc_t, acc_t>;
  k.add_storage_row = &add_row<storage_t, acc_t>;
  k.sum_row = &sum_row<storage_t, acc_t>;
  return k;
}
