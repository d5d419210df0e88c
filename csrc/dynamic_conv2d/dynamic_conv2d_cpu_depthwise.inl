// SPDX-License-Identifier: BSD-3-Clause
// Loops of depthwise dynamic_conv2d: a vector is a pixel of as many channels as it has lanes. Included after simd.inl.

// A plane of vectors, (rows, columns), with a border around the image in it.
template <class acc_t>
struct Plane {
  acc_t* data;
  int64_t columns;
  DYNCONV_INLINE acc_t* at(int64_t y, int64_t x) const { return data + (y * columns + x) * Simd<acc_t>::lanes; }
};

// An image's channels into the inner part of a plane; lanes beyond the channels are zero.
template <class storage_t, class acc_t>
void load_plane(const DepthwiseImage<storage_t>& image, acc_t* data, int64_t columns, int64_t top, int64_t left) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  const Plane<acc_t> plane{data, columns};
  for (int64_t y = 0; y < image.height; ++y) {
    const storage_t* row = image.data + y * image.width * image.pixel_stride;
    acc_t* to = plane.at(y + top, left);
    if (image.channel_stride == 1) {
      for (int64_t x = 0; x < image.width; ++x, row += image.pixel_stride, to += lanes)
        store(to, image.channels >= lanes ? load(row) : load_partial<acc_t>(row, image.channels));
    } else {
      for (int64_t x = 0; x < image.width; x += lanes) {
        const int64_t rest = image.width - x;
        // A vector may run on into the channel's next rows: those lanes are not used.
        const bool whole = y * image.width + x + lanes <= image.height * image.width;
        Vec<acc_t> block[lanes] = {};
        for (int64_t c = 0; c < image.channels; ++c) {
          const storage_t* from = row + c * image.channel_stride + x;
          block[c] = whole ? load(from) : load_partial<acc_t>(from, rest);
        }
        transpose_block<acc_t>(block);
        for (int64_t i = 0; i < lanes && i < rest; ++i, to += lanes) store(to, block[i]);
      }
    }
  }
}

// Back: a row of vectors to row y of the image's channels. Rows are stored in order: what follows a row may be overwritten.
template <class storage_t, class acc_t>
DYNCONV_INLINE void store_row(const acc_t* from, const DepthwiseImage<storage_t>& image, int64_t y, storage_t* to_image) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  storage_t* row = to_image + y * image.width * image.pixel_stride;
  if (image.channel_stride == 1) {
    for (int64_t x = 0; x < image.width; ++x, row += image.pixel_stride, from += lanes) {
      if (image.channels >= lanes) store(row, load(from));
      else store_partial<acc_t>(row, load(from), image.channels);
    }
  } else {
    for (int64_t x = 0; x < image.width; x += lanes, from += lanes * lanes) {
      const int64_t rest = image.width - x;
      const bool whole = y * image.width + x + lanes <= image.height * image.width;
      Vec<acc_t> block[lanes] = {};
      for (int64_t i = 0; i < lanes && i < rest; ++i) block[i] = load(from + i * lanes);
      transpose_block<acc_t>(block);
      for (int64_t c = 0; c < image.channels; ++c) {
        storage_t* to = row + c * image.channel_stride + x;
        if (whole) store(to, block[c]);
        else store_partial<acc_t>(to, block[c], rest);
      }
    }
  }
}

template <class storage_t, class acc_t>
void store_plane(const acc_t* data, int64_t columns, int64_t top, int64_t left, const DepthwiseImage<storage_t>& image,
                 storage_t* to) {
  for (int64_t y = 0; y < image.height; ++y)
    store_row<storage_t, acc_t>(data + ((y + top) * columns + left) * Simd<acc_t>::lanes, image, y, to);
}

// P neighbouring pixels from x on of a row of results.
template <int P, class acc_t>
DYNCONV_INLINE void convolve_pixels(const DepthwiseGeometry& g, const Plane<const acc_t>& source, const acc_t* kernel,
                                    Vec<acc_t> bias, int64_t y, int64_t x, acc_t* out) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  Vec<acc_t> sum[P];
  for (int p = 0; p < P; ++p) sum[p] = bias;
  for (int64_t i = 0; i < g.kernel_height; ++i) {
    const acc_t* from = source.at(y * g.stride_height + i * g.dilation_height, x * g.stride_width);
    for (int64_t j = 0; j < g.kernel_width; ++j, kernel += lanes, from += g.dilation_width * lanes) {
      const Vec<acc_t> weight = load(kernel);
      for (int p = 0; p < P; ++p) sum[p] += weight * load(from + p * g.stride_width * lanes);
    }
  }
  for (int p = 0; p < P; ++p) store(out + (x + p) * lanes, sum[p]);
}

// Results of the valid convolution of a plane: (out_height, out_width) vectors, row by row, to an image.
// scratch: a row of results. bias: a vector, or null.
template <class storage_t, class acc_t>
void convolve_plane(const DepthwiseGeometry& g, const acc_t* data, int64_t columns, const acc_t* kernel,
                    const acc_t* bias, const DepthwiseImage<storage_t>& image, acc_t* scratch, storage_t* out) {
  const Plane<const acc_t> source{data, columns};
  Vec<acc_t> first = {};
  if (bias) first = load(bias);
  for (int64_t y = 0; y < image.height; ++y) {
    int64_t x = 0;
    for (; x + 8 <= image.width; x += 8) convolve_pixels<8, acc_t>(g, source, kernel, first, y, x, scratch);
    for (; x + 2 <= image.width; x += 2) convolve_pixels<2, acc_t>(g, source, kernel, first, y, x, scratch);
    for (; x < image.width; ++x) convolve_pixels<1, acc_t>(g, source, kernel, first, y, x, scratch);
    store_row<storage_t, acc_t>(scratch, image, y, out);
  }
}

// grad_source += the kernel times grad_out, pixel by pixel of grad_out (height, width).
template <class acc_t>
void scatter_plane(const DepthwiseGeometry& g, const acc_t* grad_out, int64_t height, int64_t width, const acc_t* kernel,
                   acc_t* grad_source, int64_t columns) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  const Plane<acc_t> to{grad_source, columns};
  for (int64_t y = 0; y < height; ++y)
    for (int64_t i = 0; i < g.kernel_height; ++i)
      for (int64_t j = 0; j < g.kernel_width; ++j) {
        const Vec<acc_t> weight = load(kernel + (i * g.kernel_width + j) * lanes);
        acc_t* at = to.at(y * g.stride_height + i * g.dilation_height, j * g.dilation_width);
        const acc_t* from = grad_out + y * width * lanes;
        for (int64_t x = 0; x < width; ++x, at += g.stride_width * lanes, from += lanes)
          store(at, load(at) + weight * load(from));
      }
}

// T taps from `first` on: grads[t] = sum over pixels of grad_out times the source that the tap reads.
template <int T, class acc_t>
DYNCONV_INLINE void correlate_taps(const DepthwiseGeometry& g, const Plane<const acc_t>& source, const acc_t* grad_out,
                                   int64_t height, int64_t width, int64_t first, acc_t* grads) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  Vec<acc_t> sum[T] = {};
  for (int64_t y = 0; y < height; ++y) {
    const acc_t* from[T];
    for (int t = 0; t < T; ++t) {
      const int64_t i = (first + t) / g.kernel_width, j = (first + t) % g.kernel_width;
      from[t] = source.at(y * g.stride_height + i * g.dilation_height, j * g.dilation_width);
    }
    for (int64_t x = 0; x < width; ++x, grad_out += lanes) {
      const Vec<acc_t> grad = load(grad_out);
      for (int t = 0; t < T; ++t) sum[t] += grad * load(from[t] + x * g.stride_width * lanes);
    }
  }
  for (int t = 0; t < T; ++t) store(grads + (first + t) * lanes, sum[t]);
}

template <class acc_t>
void correlate_plane(const DepthwiseGeometry& g, const acc_t* data, int64_t columns, const acc_t* grad_out,
                     int64_t height, int64_t width, acc_t* grads) {
  const Plane<const acc_t> source{data, columns};
  const int64_t taps = g.kernel_height * g.kernel_width;
  int64_t t = 0;
  for (; t + 9 <= taps; t += 9) correlate_taps<9, acc_t>(g, source, grad_out, height, width, t, grads);
  for (; t + 3 <= taps; t += 3) correlate_taps<3, acc_t>(g, source, grad_out, height, width, t, grads);
  for (; t < taps; ++t) correlate_taps<1, acc_t>(g, source, grad_out, height, width, t, grads);
}

// mixed[t] = sum_k a[k] bank[k][t] of (K, taps) vectors.
template <class acc_t>
void mix_plane(const acc_t* bank, const acc_t* a, int64_t kernels, int64_t taps, acc_t* mixed) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  for (int64_t t = 0; t < taps; ++t) {
    Vec<acc_t> sum = {};
    for (int64_t k = 0; k < kernels; ++k) sum += a[k] * load(bank + (k * taps + t) * lanes);
    store(mixed + t * lanes, sum);
  }
}

// sums[k][t] += a[k] grads[t], and dots[k] += <bank[k], grads>; either may be null.
template <class acc_t>
void unmix_plane(const acc_t* bank, const acc_t* a, const acc_t* grads, int64_t kernels, int64_t taps, acc_t* sums,
                 acc_t* dots) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  for (int64_t k = 0; k < kernels; ++k) {
    Vec<acc_t> dot = {};
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t at = (k * taps + t) * lanes;
      const Vec<acc_t> grad = load(grads + t * lanes);
      if (sums) store(sums + at, load(sums + at) + a[k] * grad);
      dot += grad * load(bank + at);
    }
    if (dots) dots[k] += sum_lanes<acc_t>(dot);
  }
}

template <class storage_t, class acc_t>
DepthwiseKernels<storage_t, acc_t> depthwise_kernels() {
  return {Simd<acc_t>::lanes,        &load_plane<storage_t, acc_t>, &store_plane<storage_t, acc_t>,
          &convolve_plane<storage_t, acc_t>, &scatter_plane<acc_t>,  &correlate_plane<acc_t>,
          &mix_plane<acc_t>,         &unmix_plane<acc_t>};
}
