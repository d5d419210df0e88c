// SPDX-License-Identifier: BSD-3-Clause
// Maths of the mixing weights, host and device: softmax with a temperature, and its gradient.
#pragma once

#include "common/host_device.h"
#include "dynamic_conv2d/dynamic_conv2d.h"

#include <cmath>
#include <cstdint>

namespace dynconv {

// values[0..K) of one sample: attention in, mixing weights out.
template <class acc_t>
DYNCONV_HOST_DEVICE void mixing_weights(const KernelBankParams& p, acc_t* values) {
  if (!p.softmax) return;
  acc_t highest = values[0];
  for (int64_t k = 1; k < p.num_kernels; ++k)
    if (values[k] > highest || values[k] != values[k]) highest = values[k];
  acc_t sum = 0;
  for (int64_t k = 0; k < p.num_kernels; ++k) {
    // The difference first: logits / temperature could overflow where their difference does not.
    values[k] = std::exp((values[k] - highest) / acc_t(p.temperature));
    sum += values[k];
  }
  for (int64_t k = 0; k < p.num_kernels; ++k) values[k] /= sum;
}

// The gradient of attention[k] from mix, the mixing weights, and grad, their gradient, of one sample.
template <class acc_t>
DYNCONV_HOST_DEVICE acc_t grad_attention(const KernelBankParams& p, const acc_t* mix, const acc_t* grad, int64_t k) {
  if (!p.softmax) return grad[k];
  acc_t mean = 0;
  for (int64_t j = 0; j < p.num_kernels; ++j) mean += mix[j] * grad[j];
  return mix[k] * (grad[k] - mean) / acc_t(p.temperature);
}

}  // namespace dynconv
