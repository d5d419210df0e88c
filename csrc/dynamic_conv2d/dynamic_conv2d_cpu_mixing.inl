// SPDX-License-Identifier: BSD-3-Clause
// Loops of dynamic_conv2d over the bank: mixing kernels, and sharing out the gradient of mixed ones. Included after
// simd.inl.

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
