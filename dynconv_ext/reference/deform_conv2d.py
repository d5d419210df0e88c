# SPDX-License-Identifier: BSD-3-Clause
"""Modulated deformable convolution in plain PyTorch (arXiv:1703.06211, arXiv:1811.11168)."""

from __future__ import annotations

import torch
from torch import Tensor


def bilinear_sample(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Samples images at fractional coordinates; a corner outside the image counts 0.

    Args:
        images: (B, C, H, W).
        y: (B, P) rows, in pixels.
        x: (B, P) columns, in pixels.

    Returns:
        (B, C, P). Zero, with zero gradients, unless -1 < y < H and -1 < x < W; NaN for a NaN coordinate.
    """
    batch, channels, height, width = images.shape
    nan = y.isnan() | x.isnan()
    outside = ((y <= -1) | (y >= height) | (x <= -1) | (x >= width)) & ~nan
    # Replaced before the arithmetic, so that an infinite coordinate makes no NaN in the backward pass either.
    y, x = torch.where(outside, 0, y), torch.where(outside, 0, x)
    top, left = y.detach().floor(), x.detach().floor()
    fraction_y, fraction_x = y - top, x - left
    flat = images.reshape(batch, channels, height * width)
    value = torch.zeros((), dtype=images.dtype, device=images.device)
    for down, weight_y in ((0, 1 - fraction_y), (1, fraction_y)):
        for right, weight_x in ((0, 1 - fraction_x), (1, fraction_x)):
            row, column = top + down, left + right
            valid = (row >= 0) & (row < height) & (column >= 0) & (column < width)  # False for NaN
            index = torch.where(valid, row * width + column, 0).long()
            corner = flat.gather(2, index[:, None].expand(-1, channels, -1))
            corner = torch.where(valid[:, None], corner, 0)
            value = value + (weight_y * weight_x)[:, None] * corner
    return torch.where(outside[:, None], 0, value)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """The formula of :func:`dynconv_ext.deform_conv2d`, in plain PyTorch.

    16-bit tensors are computed in float32. Arguments are not checked.

    Args:
        input: (N, C, H, W).
        offset: (N, 2 * D * kH * kW, Ho, Wo), in input pixels, D offset groups, (vertical, horizontal) by tap.
        weight: (O, C / groups, kH, kW).
        bias: (O,).
        stride, padding, dilation: ints or pairs (height, width), in pixels.
        mask: (N, D * kH * kW, Ho, Wo); absent means 1.

    Returns:
        (N, O, Ho, Wo), of input's dtype.

    Example:
        >>> x = torch.arange(4.0).reshape(1, 1, 1, 4)
        >>> right = torch.tensor([0.0, 0.5]).reshape(1, 2, 1, 1).expand(1, 2, 1, 4)  # half a pixel
        >>> deform_conv2d(x, right, torch.ones(1, 1, 1, 1)).flatten()
        tensor([0.5000, 1.5000, 2.5000, 1.5000])

    Source: Dai et al. 2017, arXiv:1703.06211; Zhu et al. 2019, arXiv:1811.11168, eq. 1.
    """
    stride, padding, dilation = (v if isinstance(v, tuple | list) else (v, v) for v in (stride, padding, dilation))
    batch, channels, height, width = input.shape
    out_channels, group_channels, kernel_height, kernel_width = weight.shape
    out_height, out_width = offset.shape[2:]
    taps, groups = kernel_height * kernel_width, channels // group_channels
    offset_groups = offset.shape[1] // (2 * taps)
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32

    # Coordinates of every tap, (N, D, K, Ho, Wo).
    shift = offset.to(compute).reshape(batch, offset_groups, taps, 2, out_height, out_width)
    options = {"dtype": compute, "device": input.device}
    row = (torch.arange(out_height, **options) * stride[0] - padding[0])[:, None]
    column = (torch.arange(out_width, **options) * stride[1] - padding[1])[None, :]
    tap_row = (torch.arange(kernel_height, **options) * dilation[0]).repeat_interleave(kernel_width)
    tap_column = (torch.arange(kernel_width, **options) * dilation[1]).repeat(kernel_height)
    y = row + tap_row[:, None, None] + shift[:, :, :, 0]
    x = column + tap_column[:, None, None] + shift[:, :, :, 1]

    images = input.to(compute).reshape(batch * offset_groups, channels // offset_groups, height, width)
    points = taps * out_height * out_width
    samples = bilinear_sample(
        images, y.reshape(batch * offset_groups, points), x.reshape(batch * offset_groups, points)
    )
    samples = samples.reshape(batch, offset_groups, channels // offset_groups, taps, out_height, out_width)
    if mask is not None:
        samples = samples * mask.to(compute).reshape(batch, offset_groups, 1, taps, out_height, out_width)

    samples = samples.reshape(batch, groups, group_channels, taps, out_height, out_width)
    kernel = weight.to(compute).reshape(groups, out_channels // groups, group_channels, taps)
    out = torch.einsum("ngckhw,gock->ngohw", samples, kernel).reshape(batch, out_channels, out_height, out_width)
    if bias is not None:
        out = out + bias.to(compute)[:, None, None]
    return out.to(input.dtype)
