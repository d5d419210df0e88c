// SPDX-License-Identifier: BSD-3-Clause
// Per-sample maths of deform_conv2d, host and device: where a tap samples, with what weights, and the gradients.
#pragma once

#include "common/host_device.h"

#include <cmath>
#include <cstdint>

namespace dynconv {

// One bilinear sample. Corners are numbered 0..3 = (top, left), (top, right), (bottom, left), (bottom, right).
template <class acc_t>
struct BilinearSample {
  int top, left;              // pixel of corner 0; may be -1
  acc_t weight[4];            // of each corner, mask not included; 0 for a sample outside, NaN for a NaN coordinate
  acc_t fraction_y, fraction_x;  // distance from corner 0
  bool inside;                // false: outside or NaN, no corner may be read

  // Whether corner i lies in the image.
  DYNCONV_HOST_DEVICE bool has(int i, int64_t height, int64_t width) const {
    const int row = top + (i >> 1), column = left + (i & 1);
    return inside && row >= 0 && row < height && column >= 0 && column < width;
  }
};

template <class acc_t>
DYNCONV_HOST_DEVICE BilinearSample<acc_t> bilinear_sample(acc_t y, acc_t x, int64_t height, int64_t width) {
  BilinearSample<acc_t> s;
  s.inside = y > acc_t(-1) && y < acc_t(height) && x > acc_t(-1) && x < acc_t(width);
  if (!s.inside) {
    // A NaN coordinate must show; x - x is NaN for an infinite x as well, which is outside.
    const bool nan = y != y || x != x;
    const acc_t value = nan ? (y != y ? y : x) : acc_t(0);
    s.top = s.left = 0;
    s.fraction_y = s.fraction_x = value;
    for (int i = 0; i < 4; ++i) s.weight[i] = value;
    return s;
  }
  const acc_t top = std::floor(y), left = std::floor(x);
  s.top = int(top);
  s.left = int(left);
  s.fraction_y = y - top;
  s.fraction_x = x - left;
  const acc_t rest_y = acc_t(1) - s.fraction_y, rest_x = acc_t(1) - s.fraction_x;
  s.weight[0] = rest_y * rest_x;
  s.weight[1] = rest_y * s.fraction_x;
  s.weight[2] = s.fraction_y * rest_x;
  s.weight[3] = s.fraction_y * s.fraction_x;
  return s;
}

// Gradients of one tap from the four products dot[i] = <gradient of the sampled values, corner i>, over channels.
template <class acc_t>
DYNCONV_HOST_DEVICE void sample_gradients(const BilinearSample<acc_t>& s, const acc_t dot[4], acc_t mask, acc_t* grad_y,
                                          acc_t* grad_x, acc_t* grad_mask) {
  const acc_t rest_y = acc_t(1) - s.fraction_y, rest_x = acc_t(1) - s.fraction_x;
  *grad_mask = s.weight[0] * dot[0] + s.weight[1] * dot[1] + s.weight[2] * dot[2] + s.weight[3] * dot[3];
  *grad_y = mask * (rest_x * (dot[2] - dot[0]) + s.fraction_x * (dot[3] - dot[1]));
  *grad_x = mask * (rest_y * (dot[1] - dot[0]) + s.fraction_y * (dot[3] - dot[2]));
}

}  // namespace dynconv
