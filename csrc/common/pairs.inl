// SPDX-License-Identifier: BSD-3-Clause
// Panels for matmul_pairs: bfloat16, two steps of the depth side by side in a 32-bit word. Included after simd.inl, for
// vectors of kPairPanel words.

// low[i], high[i] in a word; both hold bfloat16 values.
DYNCONV_INLINE Vec<float> pair_words(Vec<float> low, Vec<float> high) {
  const u32_vec bits = __builtin_bit_cast(u32_vec, low) >> 16;
  return __builtin_bit_cast(Vec<float>, bits | __builtin_bit_cast(u32_vec, high));
}

DYNCONV_INLINE void store_words(bfloat16* p, Vec<float> words) { store(reinterpret_cast<float*>(p), words); }

// panels[panel][row pair][pixel of the panel][2], rows up to padded_rows, of rows that are row_stride and pixels that are
// pixel_stride apart, one of which is 1.
inline void make_pair_panels(const bfloat16* from, int64_t row_stride, int64_t pixel_stride, int64_t rows,
                             int64_t padded_rows, int64_t pixels, bfloat16* panels) {
  for (int64_t begin = 0; begin < pixels; begin += kPairPanel) {
    const int64_t count = pixels - begin < kPairPanel ? pixels - begin : kPairPanel;
    if (pixel_stride != 1) {
      // A pixel's rows lie side by side, in words as they are wanted: these are turned over.
      for (int64_t row = 0; row < padded_rows; row += 2 * kPairPanel) {
        Vec<float> words[kPairPanel] = {};
        const bfloat16* source = from + begin * pixel_stride + row;
        const int64_t there = rows - row < 2 * kPairPanel ? rows - row : 2 * kPairPanel;
        for (int64_t i = 0; i < count && there > 0; ++i) {
          if (there == 2 * kPairPanel)
            words[i] = load(reinterpret_cast<const float*>(source + i * pixel_stride));
          else
            __builtin_memcpy(&words[i], source + i * pixel_stride, size_t(there) * sizeof(bfloat16));
        }
        transpose_block<float>(words);
        for (int64_t i = 0; i < kPairPanel && row + 2 * i < padded_rows; ++i, panels += 2 * kPairPanel)
          store_words(panels, words[i]);
      }
      continue;
    }
    for (int64_t row = 0; row < padded_rows; row += 2, panels += 2 * kPairPanel) {
      const bfloat16* low = from + row * row_stride + begin;
      const bfloat16* high = low + row_stride;
      if (row + 1 < rows && count == kPairPanel) {
        store_words(panels, pair_words(load(low), load(high)));
      } else {
        store_words(panels, Vec<float>{});
        for (int64_t i = 0; i < count; ++i) {
          if (row < rows) panels[2 * i] = low[i];
          if (row + 1 < rows) panels[2 * i + 1] = high[i];
        }
      }
    }
  }
}
