// SPDX-License-Identifier: BSD-3-Clause
// Per-sample maths of deform_conv2d, host and device: where a tap samples, with what weights, and the gradients.
// T is a number, or a vector of numbers in the compiler's vector extension, one sample a lane: hence no branches.
// Included inside a namespace, with no guard, after a floor_of(T): the CPU kernels compile it for each instruction set.

// One bilinear sample. Corners are numbered 0..3 = (top, left), (top, right), (bottom, left), (bottom, right).
template <class T>
struct BilinearSample {
  T top, left;                // pixel of corner 0, whole numbers; may be -1; 0 for a sample outside
  T fraction_y, fraction_x;   // distance from corner 0; NaN for a NaN coordinate
  T weight[4];                // of each corner, mask not included; 0 for a sample outside, NaN for a NaN coordinate
};

// Returns whether the sample is inside, that is -1 < y < height and -1 < x < width: false as well for NaN, and then no
// corner may be read. The result is a bool, or a vector's lane mask.
template <class T>
DYNCONV_HOST_DEVICE auto bilinear_sample(T y, T x, T height, T width, BilinearSample<T>* s) {
  const T zero{};
  const auto inside = (y > zero - 1) & (y < height) & (x > zero - 1) & (x < width);
  const auto nan = (y != y) | (x != x);
  const T safe_y = inside ? y : zero, safe_x = inside ? x : zero;
  s->top = floor_of(safe_y);
  s->left = floor_of(safe_x);
  // A NaN coordinate must show in value and gradients; y + x alone would be NaN for +inf and -inf as well.
  const T poison = nan ? y + x : zero;
  s->fraction_y = safe_y - s->top + poison;
  s->fraction_x = safe_x - s->left + poison;
  const T rest_y = 1 - s->fraction_y, rest_x = 1 - s->fraction_x;
  const T one = inside ? zero + 1 : poison;  // 1 inside, 0 outside, NaN for NaN
  s->weight[0] = rest_y * rest_x * one;
  s->weight[1] = rest_y * s->fraction_x * one;
  s->weight[2] = s->fraction_y * rest_x * one;
  s->weight[3] = s->fraction_y * s->fraction_x * one;
  return inside;
}

// Gradients of one tap from the four products dot[i] = <gradient of the sampled values, corner i>, over channels; a
// corner outside the image has the product 0.
template <class T>
DYNCONV_HOST_DEVICE void sample_gradients(T fraction_y, T fraction_x, const T dot[4], T mask, T* grad_y, T* grad_x,
                                          T* grad_mask) {
  const T rest_y = 1 - fraction_y, rest_x = 1 - fraction_x;
  *grad_mask = rest_y * (rest_x * dot[0] + fraction_x * dot[1]) + fraction_y * (rest_x * dot[2] + fraction_x * dot[3]);
  *grad_y = mask * (rest_x * (dot[2] - dot[0]) + fraction_x * (dot[3] - dot[1]));
  *grad_x = mask * (rest_y * (dot[1] - dot[0]) + fraction_y * (dot[3] - dot[2]));
}
