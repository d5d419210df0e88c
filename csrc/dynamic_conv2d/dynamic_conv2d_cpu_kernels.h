// SPDX-License-Identifier: BSD-3-Clause
// Loops of dynamic_conv2d that run per instruction set: included by foreach_cpu_level.h inside a namespace, after
// simd.inl.

// out[s][i] = sum_k a[s][k] * bank[k][i] for samples s < S: the bank's vectors are loaded once for all of them.
template <int S, class storage_t, class acc_t, class out_t>
DYNCONV_INLINE void mix_samples(const storage_t* bank, int64_t bank_stride, int64_t num_kernels, const acc_t* a,
                                int64_t count, out_t* out, int64_t out_stride) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  constexpr int U = DYNCONV_LEVEL == 2 ? 4 : 2;
  int64_t i = 0;
  for (; i + U * lanes <= count; i += U * lanes) {
    Vec<acc_t> sum[S][U] = {};
    for (int64_t k = 0; k < num_kernels; ++k) {
      const storage_t* kernel = bank + k * bank_stride + i;
      Vec<acc_t> value[U];
      for (int u = 0; u < U; ++u) value[u] = load(kernel + u * lanes);
      for (int s = 0; s < S; ++s)
        for (int u = 0; u < U; ++u) sum[s][u] += a[s * num_kernels + k] * value[u];
    }
    for (int s = 0; s < S; ++s)
      for (int u = 0; u < U; ++u) store(out + s * out_stride + i + u * lanes, sum[s][u]);
  }
  for (; i < count; i += lanes) {
    const int64_t rest = count - i;
    Vec<acc_t> sum[S] = {};
    for (int64_t k = 0; k < num_kernels; ++k) {
      const storage_t* kernel = bank + k * bank_stride + i;
      const Vec<acc_t> value = rest >= lanes ? load(kernel) : load_partial<acc_t>(kernel, rest);
      for (int s = 0; s < S; ++s) sum[s] += a[s * num_kernels + k] * value;
    }
    for (int s = 0; s < S; ++s) {
      if (rest >= lanes) store(out + s * out_stride + i, sum[s]);
      else store_partial<acc_t>(out + s * out_stride + i, sum[s], rest);
    }
  }
}

template <class storage_t, class acc_t, class out_t>
void mix(const storage_t* bank, int64_t bank_stride, int64_t num_kernels, const acc_t* a, int64_t samples,
         int64_t count, out_t* out, int64_t out_stride) {
  int64_t s = 0;
  for (; s + 4 <= samples; s += 4)
    mix_samples<4>(bank, bank_stride, num_kernels, a + s * num_kernels, count, out + s * out_stride, out_stride);
  for (; s + 2 <= samples; s += 2)
    mix_samples<2>(bank, bank_stride, num_kernels, a + s * num_kernels, count, out + s * out_stride, out_stride);
  for (; s < samples; ++s)
    mix_samples<1>(bank, bank_stride, num_kernels, a + s * num_kernels, count, out + s * out_stride, out_stride);
}

// For samples s < S and kernels k < K: grad_bank[k][i] += a[s][k] * grads[s][i], and dots[s][k] += <bank[k], grads[s]>,
// in one pass. grad_bank or dots may be null.
template <int S, int K, class storage_t, class acc_t, class grad_t>
DYNCONV_INLINE void unmix_samples(const storage_t* bank, int64_t bank_stride, const grad_t* grads, int64_t grad_stride,
                                  const acc_t* a, int64_t num_kernels, int64_t count, acc_t* grad_bank,
                                  int64_t grad_bank_stride, acc_t* dots) {
  constexpr int64_t lanes = Simd<acc_t>::lanes;
  Vec<acc_t> dot[S][K] = {};
  for (int64_t i = 0; i < count; i += lanes) {
    const int64_t rest = count - i;
    Vec<acc_t> grad[S];
    for (int s = 0; s < S; ++s) {
      const grad_t* at = grads + s * grad_stride + i;
      grad[s] = rest >= lanes ? load(at) : load_partial<acc_t>(at, rest);
    }
    if (grad_bank) {
      for (int k = 0; k < K; ++k) {
        acc_t* at = grad_bank + k * grad_bank_stride + i;
        Vec<acc_t> sum = rest >= lanes ? load(at) : load_partial<acc_t>(at, rest);
        for (int s = 0; s < S; ++s) sum += a[s * num_kernels + k] * grad[s];
        if (rest >= lanes) store(at, sum);
        else store_partial<acc_t>(at, sum, rest);
      }
    }
    if (dots) {
      for (int k = 0; k < K; ++k) {
        const storage_t* at = bank + k * bank_stride + i;
        const Vec<acc_t> kernel = rest >= lanes ? load(at) : load_partial<acc_t>(at, rest);
        for (int s = 0; s < S; ++s) dot[s][k] += kernel * grad[s];
      }
    }
  }
  if (dots)
    for (int s = 0; s < S; ++s)
      for (int k = 0; k < K; ++k) dots[s * num_kernels + k] += sum_lanes<acc_t>(dot[s][k]);
}

template <int S, class storage_t, class acc_t, class grad_t>
DYNCONV_INLINE void unmix_kernels(const storage_t* bank, int64_t bank_stride, const grad_t* grads, int64_t grad_stride,
                                  const acc_t* a, int64_t num_kernels, int64_t count, acc_t* grad_bank,
                                  int64_t grad_bank_stride, acc_t* dots) {
  for (int64_t k = 0; k < num_kernels;) {
    const storage_t* kernel = bank + k * bank_stride;
    acc_t* grad_kernel = grad_bank ? grad_bank + k * grad_bank_stride : nullptr;
    acc_t* dot = dots ? dots + k : nullptr;
    if (num_kernels - k >= 4) {
      unmix_samples<S, 4>(kernel, bank_stride, grads, grad_stride, a + k, num_kernels, count, grad_kernel,
                          grad_bank_stride, dot);
      k += 4;
    } else if (num_kernels - k >= 2) {
      unmix_samples<S, 2>(kernel, bank_stride, grads, grad_stride, a + k, num_kernels, count, grad_kernel,
                          grad_bank_stride, dot);
      k += 2;
    } else {
      unmix_samples<S, 1>(kernel, bank_stride, grads, grad_stride, a + k, num_kernels, count, grad_kernel,
                          grad_bank_stride, dot);
      k += 1;
    }
  }
}

template <class storage_t, class acc_t, class grad_t>
void unmix(const storage_t* bank, int64_t bank_stride, const grad_t* grads, int64_t grad_stride, const acc_t* a,
           int64_t num_kernels, int64_t samples, int64_t count, acc_t* grad_bank, int64_t grad_bank_stride,
           acc_t* dots) {
  for (int64_t s = 0; s < samples;) {
    const grad_t* grad = grads + s * grad_stride;
    const acc_t* mixing = a + s * num_kernels;
    acc_t* dot = dots ? dots + s * num_kernels : nullptr;
    if (samples - s >= 4) {
      unmix_kernels<4>(bank, bank_stride, grad, grad_stride, mixing, num_kernels, count, grad_bank, grad_bank_stride,
                       dot);
      s += 4;
    } else if (samples - s >= 2) {
      unmix_kernels<2>(bank, bank_stride, grad, grad_stride, mixing, num_kernels, count, grad_bank, grad_bank_stride,
                       dot);
      s += 2;
    } else {
      unmix_kernels<1>(bank, bank_stride, grad, grad_stride, mixing, num_kernels, count, grad_bank, grad_bank_stride,
                       dot);
      s += 1;
    }
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

template <class storage_t, class acc_t, class product_t>
DynamicKernels<storage_t, acc_t, product_t> dynamic_kernels() {
  DynamicKernels<storage_t, acc_t, product_t> k;
  k.mix = &mix<storage_t, acc_t, product_t>;
  k.unmix = &unmix<storage_t, acc_t, product_t>;
  k.to_product = &convert_row<storage_t, product_t>;
  k.from_product = &convert_row<product_t, storage_t>;
  k.from_acc = &convert_row<acc_t, storage_t>;
  k.add_row = &add_row<storage_t, acc_t>;
  k.sum_row = &sum_row<storage_t, acc_t>;
  return k;
}
