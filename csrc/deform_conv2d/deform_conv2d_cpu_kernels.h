// SPDX-License-Identifier: BSD-3-Clause
// Loops of deform_conv2d that run per instruction set: included by foreach_cpu_level.h inside a namespace, after simd.inl.
//
// An image is (pixel, channel), channels fastest, so that one tap's coordinates and weights serve a run of channels.
// Columns of a tile are (group, pixel, tap, channel of the group): what the matrix product with the weight reads.

template <class acc_t, class storage_t>
struct DeformTap {
  BilinearSample<acc_t> sample;
  acc_t mask;
  const storage_t* corner[4];
};

template <class acc_t, class storage_t>
DYNCONV_INLINE void locate_tap(const DeformConv2dParams& p, const DeformImage<storage_t>& image,
                               const ScalarReader<acc_t>& offset, const ScalarReader<acc_t>& mask, int64_t n,
                               int64_t group, int64_t tap, int64_t row, int64_t column, DeformTap<acc_t, storage_t>* t) {
  const int64_t channel = group * p.taps() + tap;
  const int64_t at = n * p.offset_stride[0] + 2 * channel * p.offset_stride[1] + row * p.offset_stride[2] +
                     column * p.offset_stride[3];
  const int64_t tap_row = tap / p.kernel_width, tap_column = tap - tap_row * p.kernel_width;
  const acc_t y = acc_t(row * p.stride_height - p.padding_height + tap_row * p.dilation_height) + offset[at];
  const acc_t x = acc_t(column * p.stride_width - p.padding_width + tap_column * p.dilation_width) +
                  offset[at + p.offset_stride[1]];
  t->sample = bilinear_sample(y, x, p.height, p.width);
  t->mask = p.has_mask ? mask[n * p.mask_stride[0] + channel * p.mask_stride[1] + row * p.mask_stride[2] +
                              column * p.mask_stride[3]]
                       : acc_t(1);
  const storage_t* first = image.pixels + (t->sample.top * p.width + t->sample.left) * p.channels;
  t->corner[0] = t->sample.has(0, p.height, p.width) ? first : image.zero_row;
  t->corner[1] = t->sample.has(1, p.height, p.width) ? first + p.channels : image.zero_row;
  t->corner[2] = t->sample.has(2, p.height, p.width) ? first + p.width * p.channels : image.zero_row;
  t->corner[3] = t->sample.has(3, p.height, p.width) ? first + (p.width + 1) * p.channels : image.zero_row;
}

// Samples output pixels [begin, begin + count) of image n into columns of gemm_t.
template <class storage_t, class acc_t, class gemm_t>
void sample_tile(const DeformConv2dParams& p, DeformImage<storage_t> image, ScalarReader<acc_t> offset,
                 ScalarReader<acc_t> mask, int64_t n, int64_t begin, int64_t count, int64_t column_groups,
                 gemm_t* columns) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  const int64_t taps = p.taps(), offset_channels = p.channels / p.offset_groups;
  const int64_t group_channels = p.channels / column_groups;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = (begin + i) / p.out_width, column = (begin + i) - row * p.out_width;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t group = 0; group < p.offset_groups; ++group) {
        DeformTap<acc_t, storage_t> t;
        locate_tap(p, image, offset, mask, n, group, tap, row, column, &t);
        const acc_t w0 = t.mask * t.sample.weight[0], w1 = t.mask * t.sample.weight[1];
        const acc_t w2 = t.mask * t.sample.weight[2], w3 = t.mask * t.sample.weight[3];
        const int64_t last = (group + 1) * offset_channels;
        for (int64_t c = group * offset_channels; c < last;) {
          // A run of channels that share both groups.
          const int64_t column_group = c / group_channels, first = column_group * group_channels;
          const int64_t end = last < first + group_channels ? last : first + group_channels;
          gemm_t* out = columns + ((column_group * count + i) * taps + tap) * group_channels - first;
          for (; c + lanes <= end; c += lanes)
            store(out + c, w0 * load(t.corner[0] + c) + w1 * load(t.corner[1] + c) + w2 * load(t.corner[2] + c) +
                               w3 * load(t.corner[3] + c));
          if (c < end) {
            const int64_t rest = end - c;
            store_partial<acc_t>(out + c,
                                 w0 * load_partial<acc_t>(t.corner[0] + c, rest) +
                                     w1 * load_partial<acc_t>(t.corner[1] + c, rest) +
                                     w2 * load_partial<acc_t>(t.corner[2] + c, rest) +
                                     w3 * load_partial<acc_t>(t.corner[3] + c, rest),
                                 rest);
            c = end;
          }
        }
      }
    }
  }
}

// Takes the gradient of a tile's columns apart: into grad_input (H * W, C; null if not wanted), and grad_offset and
// grad_mask (contiguous; null data if not wanted).
template <class storage_t, class acc_t, class gemm_t>
void scatter_tile(const DeformConv2dParams& p, DeformImage<storage_t> image, ScalarReader<acc_t> offset,
                  ScalarReader<acc_t> mask, int64_t n, int64_t begin, int64_t count, int64_t column_groups,
                  const gemm_t* grad_columns, acc_t* grad_input, ScalarWriter<acc_t> grad_offset,
                  ScalarWriter<acc_t> grad_mask) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  const int64_t taps = p.taps(), offset_channels = p.channels / p.offset_groups;
  const int64_t group_channels = p.channels / column_groups, pixels = p.out_pixels();
  const bool want_dots = grad_offset.data || grad_mask.data;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = (begin + i) / p.out_width, column = (begin + i) - row * p.out_width;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t group = 0; group < p.offset_groups; ++group) {
        DeformTap<acc_t, storage_t> t;
        locate_tap(p, image, offset, mask, n, group, tap, row, column, &t);
        acc_t* target[4];
        acc_t weight[4];
        for (int j = 0; j < 4; ++j) {
          const bool wanted = grad_input && t.sample.has(j, p.height, p.width);
          target[j] = wanted ? grad_input + (t.corner[j] - image.pixels) : nullptr;
          weight[j] = t.mask * t.sample.weight[j];
        }
        Vec<acc_t> dots[4] = {};
        const int64_t last = (group + 1) * offset_channels;
        for (int64_t c = group * offset_channels; c < last;) {
          const int64_t column_group = c / group_channels, first = column_group * group_channels;
          const int64_t end = last < first + group_channels ? last : first + group_channels;
          const gemm_t* grad = grad_columns + ((column_group * count + i) * taps + tap) * group_channels - first;
          for (; c < end; c += lanes) {
            const int64_t rest = end - c;
            if (rest >= lanes) {
              const Vec<acc_t> g = load(grad + c);
              if (want_dots)
                for (int j = 0; j < 4; ++j) dots[j] += g * load(t.corner[j] + c);
              for (int j = 0; j < 4; ++j)
                if (target[j]) store(target[j] + c, load(target[j] + c) + weight[j] * g);
            } else {
              const Vec<acc_t> g = load_partial<acc_t>(grad + c, rest);
              if (want_dots)
                for (int j = 0; j < 4; ++j) dots[j] += g * load_partial<acc_t>(t.corner[j] + c, rest);
              for (int j = 0; j < 4; ++j)
                if (target[j])
                  store_partial<acc_t>(target[j] + c, load_partial<acc_t>(target[j] + c, rest) + weight[j] * g, rest);
            }
          }
          c = end;
        }
        if (want_dots) {
          const acc_t dot[4] = {sum_lanes<acc_t>(dots[0]), sum_lanes<acc_t>(dots[1]), sum_lanes<acc_t>(dots[2]),
                                sum_lanes<acc_t>(dots[3])};
          acc_t grad_y, grad_x, grad_m;
          sample_gradients(t.sample, dot, t.mask, &grad_y, &grad_x, &grad_m);
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
                             const gemm_t* columns, gemm_t* grad_columns, acc_t* grad_weight) {
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

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns, converting.
template <class from_t, class to_t>
void transpose(const from_t* from, int64_t from_stride, to_t* to, int64_t to_stride, int64_t rows, int64_t columns) {
  constexpr int64_t block = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += block)
    for (int64_t j0 = 0; j0 < columns; j0 += block) {
      const int64_t i1 = i0 + block < rows ? i0 + block : rows, j1 = j0 + block < columns ? j0 + block : columns;
      for (int64_t j = j0; j < j1; ++j)
        for (int64_t i = i0; i < i1; ++i) convert(from[i * from_stride + j], to + j * to_stride + i);
    }
}

// to[i] = from[i], converting.
template <class from_t, class to_t>
void convert_row(const from_t* from, to_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) convert(from[i], to + i);
}

// to[i] += from[i]
template <class from_t, class acc_t>
void add_row(const from_t* from, acc_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += to_acc(from[i]);
}

template <class from_t, class acc_t>
acc_t sum_row(const from_t* from, int64_t count) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  Vec<acc_t> sum = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) sum += load(from + i);
  if (i < count) sum += load_partial<acc_t>(from + i, count - i);
  return sum_lanes<acc_t>(sum);
}

template <class storage_t, class acc_t, class gemm_t>
DeformKernels<storage_t, acc_t, gemm_t> deform_kernels() {
  DeformKernels<storage_t, acc_t, gemm_t> k;
  k.sample_tile = &sample_tile<storage_t, acc_t, gemm_t>;
  k.scatter_tile = &scatter_tile<storage_t, acc_t, gemm_t>;
  k.depthwise_tile = &depthwise_tile<acc_t, gemm_t>;
  k.depthwise_backward_tile = &depthwise_backward_tile<acc_t, gemm_t>;
  k.pack_image = &transpose<storage_t, storage_t>;
  k.unpack_image = &transpose<acc_t, storage_t>;
  k.pack_grad_out = &transpose<storage_t, acc_t>;
  k.to_storage = &convert_row<acc_t, storage_t>;
  k.to_acc = &convert_row<storage_t, acc_t>;
  k.add_row = &add_row<gemm_t, acc_t>;
  k.add_acc_row = &add_row<acc_t, acc_t>;
  k.add_storage_row = &add_row<storage_t, acc_t>;
  k.sum_row = &sum_row<storage_t, acc_t>;
  return k;
}
