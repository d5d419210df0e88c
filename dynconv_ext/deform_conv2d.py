# SPDX-License-Identifier: BSD-3-Clause
"""Modulated deformable convolution: fake kernels, autograd Function, registration, autocast, function, modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init

from dynconv_ext import _extension
from dynconv_ext._layer import ConvLayer
from dynconv_ext._registration import (
    allow_tf32,
    check_same_device,
    check_tensor,
    double_backward,
    empty_if,
    empty_input_gradient,
    empty_like_layout,
    is_whole,
    only_wanted,
    output_size,
    pair,
    register_autocast,
    register_operator,
)
from dynconv_ext.reference.deform_conv2d import deform_conv2d as reference_deform_conv2d

# ------------------------------------------------------------------------------------------------------ fake kernels


def _fake(input, offset, weight, bias, stride, padding, dilation, mask, allow_tf32=False):
    check_same_device(input, offset=offset, weight=weight, bias=bias, mask=mask)
    sizes = output_size(input, weight.shape[2:], stride, padding, dilation)
    return empty_like_layout(input, (input.shape[0], weight.shape[0], *sizes))


def _fake_backward(
    grad_out, input, offset, weight, stride, padding, dilation, mask, output_mask, allow_tf32=False, deterministic=False
):
    return (
        empty_input_gradient(output_mask[0], input),
        empty_if(output_mask[1], offset, offset.shape),
        empty_if(output_mask[2], weight, weight.shape),
        empty_if(output_mask[3], weight, weight.shape[:1]),
        offset.new_empty((0,)) if mask is None else empty_if(output_mask[4], mask, mask.shape),
    )


# ----------------------------------------------------------------------------------------------------------- autograd


class DeformConv2dFunction(torch.autograd.Function):
    """deform_conv2d with its backward; registered as the autograd formula of torch.ops.dynconv_ext.deform_conv2d."""

    @staticmethod
    def forward(input, offset, weight, bias, stride, padding, dilation, mask, tf32):
        return torch.ops.dynconv_ext.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask, tf32)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, offset, weight, bias, stride, padding, dilation, mask, tf32 = inputs
        ctx.save_for_backward(input, offset, weight, mask)
        ctx.geometry = (stride, padding, dilation)
        ctx.allow_tf32 = tf32
        # Of input, offset, weight, bias, mask; torch appends entries of its own behind the arguments'.
        ctx.output_mask = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 7)]

    @staticmethod
    def backward(ctx, grad_out):
        input, offset, weight, mask = ctx.saved_tensors
        grads = torch.ops.dynconv_ext.deform_conv2d_backward(
            grad_out,
            input,
            offset,
            weight,
            *ctx.geometry,
            mask,
            ctx.output_mask,
            ctx.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
        )
        grad_input, grad_offset, grad_weight, grad_bias, grad_mask = only_wanted(grads, ctx.output_mask)
        return (
            grad_input,
            grad_offset,
            grad_weight,
            grad_bias,
            None,  # stride
            None,  # padding
            None,  # dilation
            grad_mask,
            None,  # allow_tf32
        )


class DeformConv2dBackwardFunction(torch.autograd.Function):
    """deform_conv2d_backward with its own backward (double backward), through the reference formula."""

    @staticmethod
    def forward(grad_out, input, offset, weight, stride, padding, dilation, mask, output_mask, tf32, deterministic):
        return torch.ops.dynconv_ext.deform_conv2d_backward(
            grad_out, input, offset, weight, stride, padding, dilation, mask, output_mask, tf32, deterministic
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_out, input, offset, weight, stride, padding, dilation, mask, output_mask, _, _ = inputs
        ctx.save_for_backward(grad_out, input, offset, weight, mask)
        ctx.geometry = (stride, padding, dilation)
        ctx.output_mask = output_mask

    @staticmethod
    def backward(ctx, *grads):
        grad_out, input, offset, weight, mask = ctx.saved_tensors

        def formula(input, offset, weight, bias, mask):
            return reference_deform_conv2d(input, offset, weight, bias, *ctx.geometry, mask)

        bias = weight.new_zeros(weight.shape[0])
        (grad_input, grad_offset, grad_weight, _, grad_mask), grad_grad_out = double_backward(
            formula, [input, offset, weight, bias, mask], grad_out, only_wanted(grads, ctx.output_mask)
        )
        return (
            grad_grad_out,
            grad_input,
            grad_offset,
            grad_weight,
            None,  # stride
            None,  # padding
            None,  # dilation
            grad_mask,
            None,  # output_mask
            None,  # allow_tf32
            None,  # deterministic
        )


# -------------------------------------------------------------------------------------------- registration, autocast

_library: torch.library.Library | None = None


def _register() -> None:
    global _library
    _library = torch.library.Library("dynconv_ext", "FRAGMENT")
    for name, fake, function in (
        ("deform_conv2d", _fake, DeformConv2dFunction),
        ("deform_conv2d_backward", _fake_backward, DeformConv2dBackwardFunction),
    ):
        register_operator(_library, name, fake, function)
    # Offset and mask keep their dtype: a bfloat16 coordinate near 200 is off by half a pixel.
    register_autocast(_library, "deform_conv2d", lowered=(0, 2, 3))


if _extension.loaded:
    _register()

# ---------------------------------------------------------------------------------------------------------- function


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
    r"""Modulated deformable convolution (deformable convolution v2; v1 without a mask).

    .. math::
        out[n,o,p] = bias[o] + \sum_{c,k} weight[o,c,k] \; mask[n,d(c),k,p] \;
        sample(input[n,c],\; p \cdot stride - padding + k \cdot dilation + offset[n,d(c),k,p])

    ``sample`` is bilinear, a corner outside the image counts 0. The value, and the gradient with respect to the
    offset, is 0 unless -1 < y < H and -1 < x < W: torchvision differs at exactly -1, where it gives a one-sided
    gradient. A NaN coordinate gives NaN.

    Args:
        input: (N, C, H, W), contiguous or channels_last, in which case the output is channels_last as well.
        offset: (N, 2 * D * kH * kW, Ho, Wo), in input pixels, D offset groups, each for C / D consecutive channels.
            Channel 2 * (d * kH * kW + i * kW + j) is the vertical offset of tap (i, j), the next one the horizontal.
        weight: (O, C / groups, kH, kW); groups follows from the shapes.
        bias: (O,).
        stride: step of the kernel, in input pixels.
        padding: zeros assumed around the input, in pixels.
        dilation: distance of the taps, in pixels.
        mask: (N, D * kH * kW, Ho, Wo), any real values; absent means 1.

    float32, float64, bfloat16 and float16; sums and coordinates are float32 (float64 for float64). Offset and mask may
    be float32 beside 16-bit input and weight; autocast lowers input, weight and bias only. On a GPU, float32 products
    are exact, or rounded to TF32 where ``torch.set_float32_matmul_precision`` or
    ``torch.backends.cuda.matmul.fp32_precision`` allows it, and the sums of the input's gradient have no fixed order
    unless ``torch.use_deterministic_algorithms(True)`` is set.

    Returns:
        (N, O, Ho, Wo).

    Raises:
        RuntimeError: a shape, dtype or device does not fit; names the argument, what came and what was expected.
        TypeError: an argument is no tensor, or no int or pair of ints.
        ImportError: the compiled library is missing.

    Example:
        >>> x, weight = torch.ones(1, 4, 8, 8), torch.ones(6, 4, 3, 3)
        >>> offset, mask = torch.zeros(1, 18, 6, 6), torch.ones(1, 9, 6, 6)
        >>> torch.equal(deform_conv2d(x, offset, weight, mask=mask), nn.functional.conv2d(x, weight))
        True

    Source: Dai et al. 2017, arXiv:1703.06211; Zhu et al. 2019, arXiv:1811.11168, eq. 1.
    """
    _extension.require()
    check_tensor("input", input)
    check_tensor("offset", offset)
    check_tensor("weight", weight)
    check_tensor("bias", bias, optional=True)
    check_tensor("mask", mask, optional=True)
    return torch.ops.dynconv_ext.deform_conv2d(
        input,
        offset,
        weight,
        bias,
        pair("stride", stride),
        pair("padding", padding),
        pair("dilation", dilation),
        mask,
        allow_tf32(input),
    )


# ----------------------------------------------------------------------------------------------------------- modules


class DeformConv2d(ConvLayer):
    """Deformable convolution with offset (and mask) given to forward; torchvision.ops.DeformConv2d's constructor.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: (kH, kW).
        stride, padding, dilation, groups: as in :func:`deform_conv2d`.
        bias: whether to learn a bias.
        device, dtype: of the parameters.

    Attributes:
        weight: (O, C / groups, kH, kW).
        bias: (O,) or None.

    Raises:
        ValueError: a number is out of range, or in_channels or out_channels no multiple of groups; names it.
        TypeError: kernel_size, stride, padding or dilation is no int or pair of ints.

    Example:
        >>> layer = DeformConv2d(4, 6, kernel_size=3, padding=1)
        >>> layer(torch.ones(1, 4, 8, 8), offset=torch.zeros(1, 18, 8, 8)).shape
        torch.Size([1, 6, 8, 8])

    Source: Dai et al. 2017, arXiv:1703.06211; Zhu et al. 2019, arXiv:1811.11168.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size, **options))
        self.bias = nn.Parameter(torch.empty(out_channels, **options)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of nn.Conv2d."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolves; the shapes decide D, the number of offset groups.

        Args:
            input: (N, C, H, W).
            offset: (N, 2 * D * kH * kW, Ho, Wo), in input pixels; channels as in :func:`deform_conv2d`.
            mask: (N, D * kH * kW, Ho, Wo), any real values; None means 1.

        Returns:
            (N, O, Ho, Wo).

        Raises:
            RuntimeError, TypeError, ImportError: as :func:`deform_conv2d` does.
        """
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask=mask)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return super().extra_repr() + (", bias=False" if self.bias is None else "")


class DeformableConv2d(ConvLayer):
    """Deformable convolution that predicts its own offset and mask, as in the source report.

    ``mask = 2 * sigmoid(modulator_conv(x))``, ``offset = offset_conv(x)``, both convolutions zero-initialised, so that
    the layer starts as an ordinary convolution. They run as one convolution. The state_dict keys are the report's:
    ``offset_conv``, ``modulator_conv`` and ``regular_conv``, each with ``weight`` and ``bias``. Drop-in for nn.Conv2d.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: (kH, kW).
        stride, padding, dilation, groups: as in :func:`deform_conv2d`.
        offset_groups: D; the prediction has 3 * D * kH * kW channels.
        bias: whether ``regular_conv`` has a bias; the predictions always have one.
        modulation: whether to predict a mask; without, the layer is that of Dai et al. 2017, arXiv:1703.06211.
        device, dtype: of the parameters.

    Attributes:
        offset_conv: nn.Conv2d, C -> 2 * D * kH * kW channels.
        modulator_conv: nn.Conv2d, C -> D * kH * kW channels; None without modulation.
        regular_conv: nn.Conv2d that holds weight (O, C / groups, kH, kW) and bias (O,) of the convolution itself.

    Raises:
        ValueError: a number is out of range, in_channels or out_channels no multiple of groups, or offset_groups no
            divisor of in_channels; names it.
        TypeError: kernel_size, stride, padding or dilation is no int or pair of ints.

    Example:
        >>> layer, x = DeformableConv2d(4, 6, kernel_size=3, padding=1), torch.ones(1, 4, 8, 8)
        >>> torch.allclose(layer(x), layer.regular_conv(x), atol=1e-5)  # before any training
        True

    Source: Zhu et al. 2019, arXiv:1811.11168, whose offsets and masks are predicted and start likewise; the factor 2,
    so that masks start at 1, is the source report's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        modulation: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        if not is_whole(offset_groups) or offset_groups < 1 or in_channels % offset_groups != 0:
            raise ValueError(f"offset_groups: got {offset_groups!r}, expected a divisor of in_channels = {in_channels}")
        options: dict[str, Any] = {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "device": device,
            "dtype": dtype,
        }
        taps = math.prod(self.kernel_size)
        self.offset_groups = offset_groups
        self.offset_conv = nn.Conv2d(in_channels, 2 * offset_groups * taps, **options)
        self.modulator_conv = nn.Conv2d(in_channels, offset_groups * taps, **options) if modulation else None
        # Holds the weight and the bias of the deformable convolution; never called as a convolution.
        self.regular_conv = nn.Conv2d(in_channels, out_channels, groups=groups, bias=bias, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero predictions, and the initialisation of nn.Conv2d for the convolution itself."""
        for conv in (self.offset_conv, self.modulator_conv):
            if conv is not None:
                init.zeros_(conv.weight)
                init.zeros_(conv.bias)
        self.regular_conv.reset_parameters()

    def predict(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the layer convolves an input with.

        Args:
            input: (N, C, H, W).

        Returns:
            Offset (N, 2 * D * kH * kW, Ho, Wo) in input pixels, and mask (N, D * kH * kW, Ho, Wo) in 0..2, or None
            without modulation.
        """
        conv = self.offset_conv
        if self.modulator_conv is None:
            return conv(input), None
        weight = torch.cat([conv.weight, self.modulator_conv.weight])
        bias = torch.cat([conv.bias, self.modulator_conv.bias])
        both = nn.functional.conv2d(input, weight, bias, conv.stride, conv.padding, conv.dilation)
        offset, logits = both.split([conv.out_channels, self.modulator_conv.out_channels], dim=1)
        return offset, 2 * logits.sigmoid()

    def forward(self, input: Tensor) -> Tensor:
        """Convolves.

        Args:
            input: (N, C, H, W).

        Returns:
            (N, O, Ho, Wo).

        Raises:
            RuntimeError: the input does not fit.
            ImportError: the compiled library is missing.
        """
        offset, mask = self.predict(input)
        conv = self.regular_conv
        return deform_conv2d(input, offset, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, mask=mask)

    def extra_repr(self) -> str:
        """What ``repr`` doesn't show with the three convolutions."""
        return f"offset_groups={self.offset_groups}"
