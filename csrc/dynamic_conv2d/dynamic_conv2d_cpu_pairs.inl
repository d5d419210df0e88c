// SPDX-License-Identifier: BSD-3-Clause
// The layouts of dynamic_conv2d_cpu_columns.inl for matmul_pairs: bfloat16, two steps of the depth side by side in a
// 32-bit word. Included after simd.inl, for vectors of kPairPanel words.

// The first count of v, zero behind them.
DYNCONV_INLINE Vec<float> first_lanes(Vec<float> v, int64_t count) {
  typename Simd<float>::int_vec lane;
  for (int i = 0; i < int(Simd<float>::lanes); ++i) lane[i] = i;
  return lane < int32_t(count) ? v : Vec<float>{};
}

// columns[panel][row pair][pixel of the panel][2], rows up to padded_rows.
inline void make_pair_columns(const float* padded, const ColumnPlan& plan, bfloat16* columns) {
  for (int64_t begin = 0; begin < plan.pixels; begin += kPairPanel) {
    const PixelRuns<float> pixels(plan.pixel_offset + begin);
    bfloat16* to = columns + begin * plan.padded_rows;
    for (int64_t row = 0; row < plan.padded_rows; row += 2, to += 2 * kPairPanel) {
      Vec<float> words = {};
      if (row + 1 < plan.rows)
        words = pair_words(pixels.load(padded + plan.row_offset[row]), pixels.load(padded + plan.row_offset[row + 1]));
      else if (row < plan.rows)
        words = pair_words(pixels.load(padded + plan.row_offset[row]), words);
      store_words(to, words);
    }
  }
}

// columns[panel of rows][pixel pair][row of the panel][2], pixels up to a multiple of kPairDepth; rows behind the last
// are those of row_offset, which is longer. Rows are read, where pixels lie side by side, and turned over.
inline void make_transposed_pair_columns(const float* padded, const ColumnPlan& plan, bfloat16* columns) {
  typedef uint16_t halves __attribute__((vector_size(DYNCONV_VECTOR_BYTES)));
  halves upper;  // the upper halves of two vectors' words
  for (int i = 0; i < 32; ++i) upper[i] = uint16_t(2 * i + 1);
  const int64_t depth = (plan.pixels + kPairDepth - 1) / kPairDepth * kPairDepth;
  for (int64_t begin = 0; begin < plan.pixels; begin += kPairDepth) {
    const int64_t count = plan.pixels - begin;
    const PixelRuns<float> low(plan.pixel_offset + begin), high(plan.pixel_offset + begin + kPairPanel);
    for (int64_t row = 0; row < plan.rows; row += kPairPanel) {
      Vec<float> words[kPairPanel];
      for (int64_t i = 0; i < kPairPanel; ++i) {
        const float* base = padded + plan.row_offset[row + i];
        Vec<float> a = low.load(base), b = {};
        if (count < kPairPanel) a = first_lanes(a, count);
        else if (count > kPairPanel) b = high.load(base);
        if (count < 2 * kPairPanel) b = first_lanes(b, count - kPairPanel);
        words[i] = __builtin_bit_cast(
            Vec<float>, __builtin_shuffle(__builtin_bit_cast(halves, a), __builtin_bit_cast(halves, b), upper));
      }
      transpose_block<float>(words);
      bfloat16* to = columns + row * depth + begin * kPairPanel;
      for (int64_t i = 0; i < kPairPanel; ++i) store_words(to + i * 2 * kPairPanel, words[i]);
    }
  }
}

// turned[weight][kPairDepth output channels] of outs rows of count weights, zero behind the last channel; weights go on
// to a whole vector.
inline void turn_over(const bfloat16* from, int64_t row_stride, int64_t outs, int64_t count, bfloat16* turned) {
  for (int64_t weight = 0; weight < count; weight += kPairPanel) {
    const int64_t rest = count - weight;
    Vec<float> words[kPairPanel];
    for (int64_t i = 0; i < kPairPanel; ++i) {
      Vec<float> half[2] = {};
      for (int64_t j = 0; j < 2; ++j) {
        const bfloat16* at = from + (2 * i + j) * row_stride + weight;
        if (2 * i + j < outs) half[j] = rest >= kPairPanel ? load(at) : load_partial<float>(at, rest);
      }
      words[i] = pair_words(half[0], half[1]);
    }
    transpose_block<float>(words);
    for (int64_t i = 0; i < kPairPanel; ++i) store_words(turned + (weight + i) * kPairDepth, words[i]);
  }
}
