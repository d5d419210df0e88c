// SPDX-License-Identifier: BSD-3-Clause
// Loops of dynamic_conv2d that run per instruction set: included by foreach_cpu_level.h inside a namespace, after
// simd.inl.

#include "common/rows.inl"

// The bank, and everything of its shape, is seen in blocks: rows (output channels) of count weights each.

// to[s][i] = sum_k a[s][k] * first[k][i] of one row, for samples s < S: the bank's vectors are loaded once for all.
template <int S, class storage_t, class acc_t, class out_t>
DYNCONV_INLINE void mix_row(const BankBlock<storage_t>& bank, const storage_t* first, const acc_t* a, out_t* to,
                            int64_t to_stride) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  constexpr int U = DYNCONV_LEVEL == 2 ? 3 : 2;
  int64_t i = 0;
  for (; i + U * lanes <= bank.count; i += U * lanes) {
    Vec<acc_t> sum[S][U] = {};
    for (int64_t k = 0; k < bank.num_kernels; ++k) {
      const storage_t* kernel = first + k * bank.kernel_stride + i;
      Vec<acc_t> value[U];
      for (int u = 0; u < U; ++u) value[u] = load(kernel + u * lanes);
      for (int s = 0; s < S; ++s)
        for (int u = 0; u < U; ++u) sum[s][u] += a[s * bank.num_kernels + k] * value[u];
    }
    for (int s = 0; s < S; ++s)
      for (int u = 0; u < U; ++u) store(to + s * to_stride + i + u * lanes, sum[s][u]);
  }
  for (; i < bank.count; i += lanes) {
    const int64_t rest = bank.count - i;
    Vec<acc_t> sum[S] = {};
    for (int64_t k = 0; k < bank.num_kernels; ++k) {
      const storage_t* kernel = first + k * bank.kernel_stride + i;
      const Vec<acc_t> value = rest >= lanes ? load(kernel) : load_partial<acc_t>(kernel, rest);
      for (int s = 0; s < S; ++s) sum[s] += a[s * bank.num_kernels + k] * value;
    }
    for (int s = 0; s < S; ++s) {
      if (rest >= lanes) store(to + s * to_stride + i, sum[s]);
      else store_partial<acc_t>(to + s * to_stride + i, sum[s], rest);
    }
  }
}

// out[s][row] = sum_k a[s][k] * bank[k][row]. Row by row, so that a row of all kernels stays in the first-level cache
// for all samples.
template <class storage_t, class acc_t, class out_t>
void mix(const BankBlock<storage_t>& bank, const acc_t* a, int64_t samples, out_t* out, int64_t out_stride,
         int64_t out_row) {
  for (int64_t row = 0; row < bank.rows; ++row) {
    const storage_t* first = bank.data + row * bank.row_stride;
    // Rows are short and far apart, so that the CPU doesn't foresee the next one.
    if (row + 1 < bank.rows)
      for (int64_t k = 0; k < bank.num_kernels; ++k) {
        const storage_t* next = first + k * bank.kernel_stride + bank.row_stride;
        for (int64_t i = 0; i < bank.count; i += 64 / int64_t(sizeof(storage_t))) __builtin_prefetch(next + i);
      }
    for (int64_t s = 0; s < samples;) {
      const acc_t* mixing = a + s * bank.num_kernels;
      out_t* to = out + s * out_stride + row * out_row;
      if (samples - s >= 4) {
        mix_row<4>(bank, first, mixing, to, out_stride);
        s += 4;
      } else if (samples - s >= 2) {
        mix_row<2>(bank, first, mixing, to, out_stride);
        s += 2;
      } else {
        mix_row<1>(bank, first, mixing, to, out_stride);
        s += 1;
      }
    }
  }
}

// For samples s < S and kernels k < K: sums[k] (+)= sum_s a[s][k] * grads[s], and dots[s][k] += <kernels[k], grads[s]>,
// in one pass over a row. dots are vectors, whose lanes are summed later. sums.data or dots may be null.
template <int S, int K, class storage_t, class acc_t, class grad_t>
DYNCONV_INLINE void unmix_row(const BankBlock<storage_t>& bank, const storage_t* kernels, const grad_t* grads,
                              int64_t grad_stride, const acc_t* a, const BankSums<acc_t>& sums, bool accumulate,
                              acc_t* dots) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  Vec<acc_t> dot[S][K] = {};
  for (int64_t i = 0; i < bank.count; i += lanes) {
    const int64_t rest = bank.count - i;
    Vec<acc_t> grad[S];
    for (int s = 0; s < S; ++s) {
      const grad_t* at = grads + s * grad_stride + i;
      grad[s] = rest >= lanes ? load(at) : load_partial<acc_t>(at, rest);
    }
    if (sums.data) {
      for (int k = 0; k < K; ++k) {
        acc_t* at = sums.data + k * sums.kernel_stride + i;
        Vec<acc_t> sum = {};
        if (accumulate) sum = rest >= lanes ? load(at) : load_partial<acc_t>(at, rest);
        for (int s = 0; s < S; ++s) sum += a[s * bank.num_kernels + k] * grad[s];
        if (rest >= lanes) store(at, sum);
        else store_partial<acc_t>(at, sum, rest);
      }
    }
    if (dots) {
      for (int k = 0; k < K; ++k) {
        const storage_t* at = kernels + k * bank.kernel_stride + i;
        const Vec<acc_t> kernel = rest >= lanes ? load(at) : load_partial<acc_t>(at, rest);
        for (int s = 0; s < S; ++s) dot[s][k] += kernel * grad[s];
      }
    }
  }
  if (dots)
    for (int s = 0; s < S; ++s)
      for (int k = 0; k < K; ++k) {
        acc_t* at = dots + (s * bank.num_kernels + k) * lanes;
        store(at, load(at) + dot[s][k]);
      }
}

template <int S, class storage_t, class acc_t, class grad_t>
DYNCONV_INLINE void unmix_kernels(const BankBlock<storage_t>& bank, const storage_t* kernels, const grad_t* grads,
                                  int64_t grad_stride, const acc_t* a, BankSums<acc_t> sums, bool accumulate,
                                  acc_t* dots) {
  for (int64_t k = 0; k < bank.num_kernels;) {
    const int64_t rest = bank.num_kernels - k, step = rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
    if (step == 4) unmix_row<S, 4>(bank, kernels, grads, grad_stride, a + k, sums, accumulate, dots);
    else if (step == 2) unmix_row<S, 2>(bank, kernels, grads, grad_stride, a + k, sums, accumulate, dots);
    else unmix_row<S, 1>(bank, kernels, grads, grad_stride, a + k, sums, accumulate, dots);
    k += step;
    kernels += step * bank.kernel_stride;
    if (sums.data) sums.data += step * sums.kernel_stride;
    if (dots) dots += step * Simd<acc_t>::lanes;
  }
}

// dots is (samples, K, lanes). Row by row, as mix.
template <class storage_t, class acc_t, class grad_t>
void unmix(const BankBlock<storage_t>& bank, const grad_t* grads, int64_t grad_stride, int64_t grad_row, const acc_t* a,
           int64_t samples, BankSums<acc_t> sums, bool accumulate, acc_t* dots) {
  for (int64_t row = 0; row < bank.rows; ++row) {
    const storage_t* kernels = bank.data + row * bank.row_stride;
    BankSums<acc_t> row_sums = sums;
    if (sums.data) row_sums.data += row * sums.row_stride;
    for (int64_t s = 0; s < samples;) {
      const int64_t rest = samples - s, step = rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
      const grad_t* grad = grads + s * grad_stride + row * grad_row;
      const acc_t* mixing = a + s * bank.num_kernels;
      acc_t* dot = dots ? dots + s * bank.num_kernels * Simd<acc_t>::lanes : nullptr;
      const bool add = accumulate || s > 0;
      if (step == 4) unmix_kernels<4>(bank, kernels, grad, grad_stride, mixing, row_sums, add, dot);
      else if (step == 2) unmix_kernels<2>(bank, kernels, grad, grad_stride, mixing, row_sums, add, dot);
      else unmix_kernels<1>(bank, kernels, grad, grad_stride, mixing, row_sums, add, dot);
      s += step;
    }
  }
}

// out[i] += sum of the lanes of vectors[i], which start again at zero.
template <class acc_t>
void add_lanes(acc_t* vectors, int64_t count, acc_t* out) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  for (int64_t i = 0; i < count; ++i) {
    out[i] += sum_lanes<acc_t>(load(vectors + i * lanes));
    store(vectors + i * lanes, Vec<acc_t>{});
  }
}

// ------------------------------------------------------------------------------------------------------ matrix product

// ROWS x VECS vectors of c, held in registers over the whole depth. A_ROW, the distance of a's rows, is a constant, so
// that their addresses take no registers.
template <int ROWS, int VECS, int A_ROW, class acc_t>
DYNCONV_INLINE void product_block(const Product<acc_t>& x, const acc_t* a, acc_t* c, const acc_t* start) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  const int64_t last = x.columns - (VECS - 1) * lanes;  // valid elements of the last vector
  Vec<acc_t> sum[ROWS][VECS] = {};
  if (start) {
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < VECS; ++v) sum[i][v] += start[i];
  } else if (x.accumulate) {
    for (int i = 0; i < ROWS; ++i)
      for (int v = 0; v < VECS; ++v) {
        const acc_t* at = c + i * x.c_row + v * lanes;
        sum[i][v] = v + 1 < VECS || last == lanes ? load(at) : load_partial<acc_t>(at, last);
      }
  }
  const acc_t* b = x.b;
  for (int64_t done = 0; done < x.depth; done += x.segment, a += x.a_segment) {
    const int64_t steps = x.depth - done < x.segment ? x.depth - done : x.segment;
    const acc_t* at = a;
    for (int64_t k = 0; k < steps; ++k, at += x.a_step, b += x.b_step) {
      Vec<acc_t> value[VECS];
      for (int v = 0; v < VECS; ++v) value[v] = load(b + v * lanes);
      for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECS; ++v) sum[i][v] += at[i * A_ROW] * value[v];
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < VECS; ++v) {
      acc_t* at = c + i * x.c_row + v * lanes;
      if (v + 1 < VECS || last == lanes) store(at, sum[i][v]);
      else store_partial<acc_t>(at, sum[i][v], last);
    }
}

template <int VECS, int A_ROW, class acc_t>
DYNCONV_INLINE void product_rows(const Product<acc_t>& x) {
  // As many sums as hide the latency of a fused multiply-add, and fit the registers.
  constexpr int most = (DYNCONV_LEVEL == 2 ? 16 : 8) / VECS;
  for (int64_t i = 0; i < x.rows;) {
    const acc_t* a = x.a + i * A_ROW;
    acc_t* c = x.c + i * x.c_row;
    const acc_t* start = x.start ? x.start + i : nullptr;
    const int64_t rest = x.rows - i;
    if (rest >= most) {
      product_block<most, VECS, A_ROW>(x, a, c, start);
      i += most;
    } else if (rest >= 4) {
      product_block<4, VECS, A_ROW>(x, a, c, start);
      i += 4;
    } else if (rest >= 2) {
      product_block<2, VECS, A_ROW>(x, a, c, start);
      i += 2;
    } else {
      product_block<1, VECS, A_ROW>(x, a, c, start);
      i += 1;
    }
  }
}

template <int A_ROW, class acc_t>
void product(const Product<acc_t>& x) {
  if (x.columns > Simd<acc_t>::lanes) product_rows<2, A_ROW>(x);
  else product_rows<1, A_ROW>(x);
}

// ------------------------------------------------------------------------------------------------------------ columns

// Rows [begin, end) of a run of an image's channels into a padded copy; rows outside the image are zero, and the
// padding left and right stays as it is.
template <class storage_t, class acc_t>
void pack_rows(const ImageChunk<storage_t>& x, int64_t begin, int64_t end, acc_t* padded) {
  for (int64_t c = 0; c < x.channels; ++c) {
    acc_t* to = padded + c * x.padded_channel;
    const storage_t* from = x.data + c * x.channel_stride;
    for (int64_t y = begin; y < end; ++y, to += x.padded_row) {
      acc_t* row = to + x.padding_width;
      if (y < 0 || y >= x.height) {
        for (int64_t i = 0; i < x.width; ++i) row[i] = 0;
      } else if (x.pixel_stride == 1) {
        const storage_t* source = from + y * x.width;
        for (int64_t i = 0; i < x.width; ++i) convert(source[i], row + i);
      } else {
        const storage_t* source = from + y * x.width * x.pixel_stride;
        for (int64_t i = 0; i < x.width; ++i) convert(source[i * x.pixel_stride], row + i);
      }
    }
  }
}

// The inner part of a padded gradient to the tensor.
template <class storage_t, class acc_t>
void unpack_rows(const acc_t* padded, int64_t padding_height, const ImageChunk<storage_t>& x) {
  for (int64_t c = 0; c < x.channels; ++c) {
    const acc_t* from = padded + c * x.padded_channel + padding_height * x.padded_row + x.padding_width;
    storage_t* to = const_cast<storage_t*>(x.data) + c * x.channel_stride;
    for (int64_t y = 0; y < x.height; ++y)
      for (int64_t i = 0; i < x.width; ++i) convert(from[y * x.padded_row + i], to + (y * x.width + i) * x.pixel_stride);
  }
}

// lanes elements base[offset[i]]
template <class acc_t>
DYNCONV_INLINE Vec<acc_t> gather(const acc_t* base, const int32_t* offset) {
#if DYNCONV_LEVEL == 2
  if constexpr (sizeof(acc_t) == 4) return (Vec<acc_t>)_mm512_i32gather_ps(_mm512_loadu_si512(offset), base, 4);
#endif
  Vec<acc_t> v;
  for (int64_t i = 0; i < Simd<acc_t>::lanes; ++i) v[i] = base[offset[i]];
  return v;
}

// How the lanes of a vector of pixels lie in the padded image: run of lanes [0, first) is contiguous, and so is the
// rest if two_runs; else any.
template <class acc_t>
DYNCONV_INLINE Vec<acc_t> load_pixels(const acc_t* base, const int32_t* offset, int64_t first, bool two_runs) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  if (first == lanes) return load(base + offset[0]);
#if DYNCONV_LEVEL == 2
  if constexpr (sizeof(acc_t) == 4) {
    if (two_runs) {
      const __mmask16 low = __mmask16((1u << first) - 1u);
      const __m512 v = _mm512_maskz_loadu_ps(low, base + offset[0]);
      return (Vec<acc_t>)_mm512_mask_loadu_ps(v, __mmask16(~low), base + offset[first] - first);
    }
  }
#endif
  return gather(base, offset);
}

// columns[panel][row][pixel of the panel] = padded[row_offset[row] + pixel_offset[pixel]]
template <class acc_t>
void make_columns(const acc_t* padded, const ColumnPlan& plan, acc_t* columns) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  for (int64_t begin = 0; begin < plan.pixels; begin += plan.panel)
    for (int64_t v = 0; v < plan.panel; v += lanes) {
      const int32_t* offset = plan.pixel_offset + begin + v;
      int64_t first = 1, second;
      while (first < lanes && offset[first] == offset[0] + int32_t(first)) ++first;
      second = first;
      while (second < lanes && offset[second] == offset[first] + int32_t(second - first)) ++second;
      const bool two_runs = second == lanes;
      acc_t* to = columns + begin * plan.rows + v;
      for (int64_t row = 0; row < plan.rows; ++row)
        store(to + row * plan.panel, load_pixels(padded + plan.row_offset[row], offset, first, two_runs));
    }
}

// columns[panel of rows][pixel][row of the panel], rows in panels of two vectors; rows behind the last are those of
// row_offset, which is longer.
template <class acc_t>
void make_transposed_columns(const acc_t* padded, const ColumnPlan& plan, acc_t* columns) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  for (int64_t begin = 0; begin < plan.rows; begin += 2 * lanes) {
    acc_t* to = columns + begin * plan.pixels;
    const int32_t* offset = plan.row_offset + begin;
    const bool both = plan.rows - begin > lanes;
    for (int64_t pixel = 0; pixel < plan.pixels; ++pixel, to += 2 * lanes) {
      const acc_t* base = padded + plan.pixel_offset[pixel];
      store(to, gather(base, offset));
      if (both) store(to + lanes, gather(base, offset + lanes));
    }
  }
}

// padded[row_offset[row] + pixel_offset[pixel]] += columns[panel][row][pixel of the panel]
template <class acc_t>
void add_columns(const acc_t* columns, const ColumnPlan& plan, acc_t* padded) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  for (int64_t begin = 0; begin < plan.pixels; begin += plan.panel) {
    const int64_t count = plan.pixels - begin < plan.panel ? plan.pixels - begin : plan.panel;
    const int32_t* offset = plan.pixel_offset + begin;
    for (int64_t first = 0; first < count;) {
      // A run of pixels that lie side by side; its columns of one row touch each element once.
      int64_t end = first + 1;
      while (end < count && offset[end] == offset[end - 1] + 1) ++end;
      const int64_t length = end - first;
      for (int64_t row = 0; row < plan.rows; ++row) {
        const acc_t* from = columns + begin * plan.rows + row * plan.panel + first;
        acc_t* to = padded + plan.row_offset[row] + offset[first];
        int64_t i = 0;
        for (; i + lanes <= length; i += lanes) store(to + i, load(to + i) + load(from + i));
        for (; i < length; ++i) to[i] += from[i];
      }
      first = end;
    }
  }
}

// panels[panel][row][pixel of the panel] of rows that are rows_stride and pixels that are pixel_stride apart.
template <class storage_t, class acc_t>
void make_panels(const storage_t* from, int64_t row_stride, int64_t pixel_stride, int64_t rows, int64_t pixels,
                 int64_t panel, acc_t* panels) {
  for (int64_t begin = 0; begin < pixels; begin += panel) {
    const int64_t count = pixels - begin < panel ? pixels - begin : panel;
    for (int64_t row = 0; row < rows; ++row) {
      const storage_t* source = from + row * row_stride + begin * pixel_stride;
      acc_t* to = panels + begin * rows + row * panel;
      if (pixel_stride == 1)
        for (int64_t i = 0; i < count; ++i) convert(source[i], to + i);
      else
        for (int64_t i = 0; i < count; ++i) convert(source[i * pixel_stride], to + i);
      for (int64_t i = count; i < panel; ++i) to[i] = 0;
    }
  }
}

// to[i * to_row + j * to_column] = from[i * from_row + j], converting.
template <class acc_t, class storage_t>
void write_rows(const acc_t* from, int64_t from_row, storage_t* to, int64_t to_row, int64_t to_column, int64_t rows,
                int64_t columns) {
  if (to_column == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) convert(from[i * from_row + j], to + i * to_row + j);
  } else {
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < rows; ++i) convert(from[i * from_row + j], to + i * to_row + j * to_column);
  }
}

template <class storage_t, class acc_t, class product_t>
DynamicKernels<storage_t, acc_t, product_t> dynamic_kernels() {
  DynamicKernels<storage_t, acc_t, product_t> k;
  k.lanes = Simd<acc_t>::lanes;
  k.mix = &mix<storage_t, acc_t, product_t>;
  k.unmix = &unmix<storage_t, acc_t, product_t>;
  k.add_lanes = &add_lanes<acc_t>;
  k.product = &product<kKernelRow, acc_t>;
  k.product_transposed = &product<1, acc_t>;
  k.product_panel = &product<int(Simd<acc_t>::lanes), acc_t>;
  k.product_two_panels = &product<2 * int(Simd<acc_t>::lanes), acc_t>;
  k.pack_rows = &pack_rows<storage_t, acc_t>;
  k.unpack_rows = &unpack_rows<storage_t, acc_t>;
  k.make_columns = &make_columns<acc_t>;
  k.make_transposed_columns = &make_transposed_columns<acc_t>;
  k.add_columns = &add_columns<acc_t>;
  k.make_panels = &make_panels<storage_t, acc_t>;
  k.write_rows = &write_rows<acc_t, storage_t>;
  k.to_product = &convert_row<storage_t, product_t>;
  k.from_product = &convert_row<product_t, storage_t>;
  k.from_acc = &convert_row<acc_t, storage_t>;
  k.add_row = &add_row<storage_t, acc_t>;
  k.sum_row = &sum_row<storage_t, acc_t>;
  return k;
}
