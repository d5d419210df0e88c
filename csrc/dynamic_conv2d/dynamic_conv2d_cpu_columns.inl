// SPDX-License-Identifier: BSD-3-Clause
// Loops of dynamic_conv2d that lay images out for the matrix product, and its results back. Included after simd.inl.

// Fewer channels side by side are not worth a block's turning over.
constexpr int64_t kTransposedChannels = 4;

// Rows [begin, end) of a run of an image's channels into a padded copy; rows outside the image are zero, and the
// padding left and right stays as it is.
template <class storage_t, class acc_t>
void pack_rows(const ImageChunk<storage_t>& x, int64_t begin, int64_t end, acc_t* padded) {
  if (x.channel_stride == 1 && x.channels >= kTransposedChannels) {
    for (int64_t y = begin; y < end; ++y, padded += x.padded_row) {
      acc_t* row = padded + x.padding_width;
      if (y >= 0 && y < x.height)
        transpose<false, acc_t>(x.data + y * x.width * x.pixel_stride, x.pixel_stride, row, x.padded_channel, x.width,
                         x.channels);
      else
        for (int64_t c = 0; c < x.channels; ++c)
          for (int64_t i = 0; i < x.width; ++i) row[c * x.padded_channel + i] = 0;
    }
    return;
  }
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
  if (x.channel_stride == 1 && x.channels >= kTransposedChannels) {
    for (int64_t y = 0; y < x.height; ++y)
      transpose<true, acc_t>(padded + (padding_height + y) * x.padded_row + x.padding_width, x.padded_channel,
                       const_cast<storage_t*>(x.data) + y * x.width * x.pixel_stride, x.pixel_stride, x.channels, x.width);
    return;
  }
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

// A vector of pixels of the padded image: where they lie as one run or two, they are read as such.
template <class acc_t>
struct PixelRuns {
  static constexpr int64_t lanes = Simd<acc_t>::lanes;
  const int32_t* offset;
  int64_t first;  // pixels of the first run
  bool two_runs;  // whether the rest is one, too

  DYNCONV_INLINE explicit PixelRuns(const int32_t* pixel_offset) : offset(pixel_offset) {
    first = 1;
    while (first < lanes && offset[first] == offset[0] + int32_t(first)) ++first;
    int64_t second = first;
    while (second < lanes && offset[second] == offset[first] + int32_t(second - first)) ++second;
    two_runs = second == lanes;
  }

  DYNCONV_INLINE Vec<acc_t> load(const acc_t* base) const {
    if (first == lanes) return load_vector(base + offset[0]);
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

 private:
  DYNCONV_INLINE static Vec<acc_t> load_vector(const acc_t* at) {
    return *reinterpret_cast<const typename Simd<acc_t>::loose*>(at);
  }
};

// columns[panel][row][pixel of the panel] = padded[row_offset[row] + pixel_offset[pixel]]
template <class acc_t>
void make_columns(const acc_t* padded, const ColumnPlan& plan, acc_t* columns) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  for (int64_t begin = 0; begin < plan.pixels; begin += plan.panel)
    for (int64_t v = 0; v < plan.panel; v += lanes) {
      const PixelRuns<acc_t> pixels(plan.pixel_offset + begin + v);
      acc_t* to = columns + begin * plan.rows + v;
      for (int64_t row = 0; row < plan.rows; ++row)
        store(to + row * plan.panel, pixels.load(padded + plan.row_offset[row]));
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
        const acc_t* from = columns + begin * plan.padded_rows + row * plan.panel + first;
        acc_t* to = padded + plan.row_offset[row] + offset[first];
        int64_t i = 0;
        for (; i + lanes <= length; i += lanes) store(to + i, load(to + i) + load(from + i));
        for (; i < length; ++i) to[i] += from[i];
      }
      first = end;
    }
  }
}

// panels[panel][row][pixel of the panel] of rows that are row_stride and pixels that are pixel_stride apart, one of
// which is 1; zero behind the last pixel.
template <class acc_t, class storage_t, class tile_t>
void make_panels(const storage_t* from, int64_t row_stride, int64_t pixel_stride, int64_t rows, int64_t pixels,
                 int64_t panel, tile_t* panels) {
  for (int64_t begin = 0; begin < pixels; begin += panel) {
    const int64_t count = pixels - begin < panel ? pixels - begin : panel;
    const storage_t* source = from + begin * pixel_stride;
    tile_t* to = panels + begin * rows;
    if (pixel_stride != 1) transpose<true, acc_t>(source, pixel_stride, to, panel, count, rows);
    for (int64_t row = 0; row < rows; ++row) {
      if (pixel_stride == 1) convert_row<acc_t>(source + row * row_stride, to + row * panel, count);
      for (int64_t i = count; i < panel; ++i) to[row * panel + i] = tile_t{};
    }
  }
}

// to[i * to_row + j * to_column] = from[i * from_row + j], converting; one of to_row and to_column is 1.
template <class acc_t, class storage_t>
void write_rows(const acc_t* from, int64_t from_row, storage_t* to, int64_t to_row, int64_t to_column, int64_t rows,
                int64_t columns) {
  if (to_column != 1) return transpose<false, acc_t>(from, from_row, to, to_column, rows, columns);
  for (int64_t i = 0; i < rows; ++i) convert_row<acc_t>(from + i * from_row, to + i * to_row, columns);
}
