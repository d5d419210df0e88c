# SPDX-License-Identifier: BSD-3-Clause
"""Dynamic convolution in plain PyTorch (arXiv:1904.04971, arXiv:1912.03458)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mixing_weights(attention: Tensor, temperature: float | None) -> Tensor:
    """(N, K) weights of the K kernels: softmax(attention / temperature), or attention itself without a temperature."""
    return attention if temperature is None else torch.softmax(attention / temperature, dim=1)


def aggregate_kernels(
    weight: Tensor, attention: Tensor, bias: Tensor | None = None, temperature: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """The formula of :func:`dynconv_ext.aggregate_kernels`, in plain PyTorch.

    16-bit tensors are computed in float32. Arguments are not checked.

    Args:
        weight: (K, O, C / groups, kH, kW).
        attention: (N, K), mixing weights, or with a temperature logits.
        bias: (K, O).
        temperature: T > 0: the mixing weights are softmax(attention / T).

    Returns:
        (N, O, C / groups, kH, kW) and (N, O), of weight's dtype; None for the second without a bias.

    Source: Yang et al. 2019, arXiv:1904.04971; Chen et al. 2020, arXiv:1912.03458, eq. 2.
    """
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    mix = mixing_weights(attention.to(compute), temperature)
    kernels = torch.einsum("nk,kocij->nocij", mix, weight.to(compute)).to(weight.dtype)
    biases = None if bias is None else (mix @ bias.to(compute)).to(weight.dtype)
    return kernels, biases


def dynamic_conv2d(
    input: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    temperature: float | None = None,
) -> Tensor:
    """The formula of :func:`dynconv_ext.dynamic_conv2d`, in plain PyTorch: every sample's columns times its own kernel.

    16-bit tensors are computed in float32. Arguments are not checked.

    Args:
        input: (N, C, H, W).
        weight: (K, O, C / groups, kH, kW).
        attention: (N, K), mixing weights, or with a temperature logits.
        bias: (K, O).
        stride, padding, dilation: ints or pairs (height, width), in pixels.
        groups: as in torch.nn.functional.conv2d.
        temperature: T > 0: the mixing weights are softmax(attention / T).

    Returns:
        (N, O, Ho, Wo), of input's dtype.

    Source: Yang et al. 2019, arXiv:1904.04971, sec. 3; Chen et al. 2020, arXiv:1912.03458, eq. 1-3.
    """
    stride, padding, dilation = (
        tuple(v) if isinstance(v, tuple | list) else (v, v) for v in (stride, padding, dilation)
    )
    batch, channels, height, width = input.shape
    _, out_channels, group_channels, kernel_height, kernel_width = weight.shape
    out_height, out_width = (
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, pad, dil, kernel, step in zip(
            (height, width), padding, dilation, (kernel_height, kernel_width), stride, strict=True
        )
    )
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    kernels, biases = aggregate_kernels(
        weight.to(compute), attention.to(compute), None if bias is None else bias.to(compute), temperature
    )
    columns = F.unfold(input.to(compute), (kernel_height, kernel_width), dilation, padding, stride)
    row = group_channels * kernel_height * kernel_width
    columns = columns.reshape(batch, groups, row, out_height * out_width)
    kernels = kernels.reshape(batch, groups, out_channels // groups, row)
    out = (kernels @ columns).reshape(batch, out_channels, out_height, out_width)
    if biases is not None:
        out = out + biases[:, :, None, None]
    return out.to(input.dtype)
