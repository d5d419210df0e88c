# SPDX-License-Identifier: BSD-3-Clause
"""Dynamic convolution: fake kernels, autograd Functions, registration, autocast, functions, module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init

from dynconv_ext import _extension
from dynconv_ext._layer import ConvLayer, at_least_one
from dynconv_ext._registration import (
    allow_tf32,
    check_same_device,
    check_tensor,
    double_backward,
    empty_if,
    empty_input_gradient,
    empty_like_layout,
    number,
    only_wanted,
    output_size,
    pair,
    register_autocast,
    register_operator,
)
from dynconv_ext.reference.dynamic_conv2d import aggregate_kernels as reference_aggregate_kernels
from dynconv_ext.reference.dynamic_conv2d import dynamic_conv2d as reference_dynamic_conv2d
from dynconv_ext.temperature import AnnealedTemperature

# ------------------------------------------------------------------------------------------------------ fake kernels


def _fake_aggregate(weight, attention, bias, temperature):
    check_same_device(weight, "weight", attention=attention, bias=bias)
    kernels = weight.new_empty((attention.shape[0], *weight.shape[1:]))
    return kernels, empty_if(bias is not None, weight, (attention.shape[0], weight.shape[1]))


def _fake_aggregate_backward(grad_kernels, grad_biases, weight, attention, bias, temperature, output_mask):
    return (
        empty_if(output_mask[0], weight, weight.shape),
        empty_if(output_mask[1], attention, attention.shape),
        empty_if(output_mask[2] and bias is not None, weight, weight.shape[:2]),
    )


def _fake(input, weight, attention, bias, stride, padding, dilation, groups, temperature, allow_tf32=False):
    check_same_device(input, weight=weight, attention=attention, bias=bias)
    sizes = output_size(input, weight.shape[3:], stride, padding, dilation)
    return empty_like_layout(input, (input.shape[0], weight.shape[1], *sizes))


def _fake_backward(
    grad_out, input, weight, attention, bias, stride, padding, dilation, groups, temperature, output_mask,
    allow_tf32=False,
):  # fmt: skip
    return (
        empty_input_gradient(output_mask[0], input),
        empty_if(output_mask[1], weight, weight.shape),
        empty_if(output_mask[2], attention, attention.shape),
        empty_if(output_mask[3] and bias is not None, weight, weight.shape[:2]),
    )


# ----------------------------------------------------------------------------------------------------------- autograd


class AggregateKernelsFunction(torch.autograd.Function):
    """aggregate_kernels with its backward; the autograd formula of torch.ops.dynconv_ext.aggregate_kernels."""

    @staticmethod
    def forward(weight, attention, bias, temperature):
        return torch.ops.dynconv_ext.aggregate_kernels(weight, attention, bias, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, attention, bias, temperature = inputs
        ctx.save_for_backward(weight, attention, bias)
        ctx.temperature = temperature
        ctx.output_mask = [ctx.needs_input_grad[i] and inputs[i] is not None for i in range(3)]

    @staticmethod
    def backward(ctx, grad_kernels, grad_biases):
        weight, attention, bias = ctx.saved_tensors
        grads = torch.ops.dynconv_ext.aggregate_kernels_backward(
            grad_kernels, None if bias is None else grad_biases, weight, attention, bias, ctx.temperature,
            ctx.output_mask,
        )  # fmt: skip
        grad_weight, grad_attention, grad_bias = only_wanted(grads, ctx.output_mask)
        return (
            grad_weight,
            grad_attention,
            grad_bias,
            None,  # temperature
        )


class AggregateKernelsBackwardFunction(torch.autograd.Function):
    """aggregate_kernels_backward with its own backward (double backward), through the reference formula."""

    @staticmethod
    def forward(grad_kernels, grad_biases, weight, attention, bias, temperature, output_mask):
        return torch.ops.dynconv_ext.aggregate_kernels_backward(
            grad_kernels, grad_biases, weight, attention, bias, temperature, output_mask
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_kernels, grad_biases, weight, attention, bias, temperature, output_mask = inputs
        ctx.save_for_backward(grad_kernels, grad_biases, weight, attention, bias)
        ctx.temperature = temperature
        ctx.output_mask = output_mask

    @staticmethod
    def backward(ctx, *grads):
        grad_kernels, grad_biases, weight, attention, bias = ctx.saved_tensors

        # Both outputs as one, so that the gradients that came into the backward are one tensor as well.
        def formula(weight, attention, bias):
            outputs = reference_aggregate_kernels(weight, attention, bias, ctx.temperature)
            return torch.cat([t.flatten(1) for t in outputs if t is not None], dim=1)

        if bias is not None and grad_biases is None:
            grad_biases = grad_kernels.new_zeros((grad_kernels.shape[0], bias.shape[1]))
        incoming = torch.cat([t.flatten(1) for t in (grad_kernels, grad_biases) if t is not None], dim=1)
        (grad_weight, grad_attention, grad_bias), grad_incoming = double_backward(
            formula, [weight, attention, bias], incoming, only_wanted(grads, ctx.output_mask)
        )
        size = grad_kernels[0].numel() if grad_kernels.shape[0] else math.prod(grad_kernels.shape[1:])
        first = None if grad_incoming is None else grad_incoming[:, :size].reshape(grad_kernels.shape)
        second = None if grad_incoming is None or ctx.saved_tensors[1] is None else grad_incoming[:, size:]
        return (
            first,
            second,
            grad_weight,
            grad_attention,
            grad_bias,
            None,  # temperature
            None,  # output_mask
        )


class DynamicConv2dFunction(torch.autograd.Function):
    """dynamic_conv2d with its backward; registered as the autograd formula of torch.ops.dynconv_ext.dynamic_conv2d."""

    @staticmethod
    def forward(input, weight, attention, bias, stride, padding, dilation, groups, temperature, tf32):
        return torch.ops.dynconv_ext.dynamic_conv2d(
            input, weight, attention, bias, stride, padding, dilation, groups, temperature, tf32
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, attention, bias, *geometry, tf32 = inputs
        # The bank and the inputs, never the mixed kernels: they are N / K times as large.
        ctx.save_for_backward(input, weight, attention, bias)
        ctx.geometry = geometry
        ctx.allow_tf32 = tf32
        ctx.output_mask = [ctx.needs_input_grad[i] and inputs[i] is not None for i in range(4)]

    @staticmethod
    def backward(ctx, grad_out):
        input, weight, attention, bias = ctx.saved_tensors
        grads = torch.ops.dynconv_ext.dynamic_conv2d_backward(
            grad_out, input, weight, attention, bias, *ctx.geometry, ctx.output_mask, ctx.allow_tf32
        )
        grad_input, grad_weight, grad_attention, grad_bias = only_wanted(grads, ctx.output_mask)
        return (
            grad_input,
            grad_weight,
            grad_attention,
            grad_bias,
            None,  # stride
            None,  # padding
            None,  # dilation
            None,  # groups
            None,  # temperature
            None,  # allow_tf32
        )


class DynamicConv2dBackwardFunction(torch.autograd.Function):
    """dynamic_conv2d_backward with its own backward (double backward), through the reference formula."""

    @staticmethod
    def forward(
        grad_out, input, weight, attention, bias, stride, padding, dilation, groups, temperature, output_mask, tf32
    ):
        return torch.ops.dynconv_ext.dynamic_conv2d_backward(
            grad_out, input, weight, attention, bias, stride, padding, dilation, groups, temperature, output_mask, tf32
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_out, input, weight, attention, bias, *geometry, output_mask, _ = inputs
        ctx.save_for_backward(grad_out, input, weight, attention, bias)
        ctx.geometry = geometry
        ctx.output_mask = output_mask

    @staticmethod
    def backward(ctx, *grads):
        grad_out, input, weight, attention, bias = ctx.saved_tensors

        def formula(input, weight, attention, bias):
            return reference_dynamic_conv2d(input, weight, attention, bias, *ctx.geometry)

        (grad_input, grad_weight, grad_attention, grad_bias), grad_grad_out = double_backward(
            formula, [input, weight, attention, bias], grad_out, only_wanted(grads, ctx.output_mask)
        )
        return (
            grad_grad_out,
            grad_input,
            grad_weight,
            grad_attention,
            grad_bias,
            None,  # stride
            None,  # padding
            None,  # dilation
            None,  # groups
            None,  # temperature
            None,  # output_mask
            None,  # allow_tf32
        )


# -------------------------------------------------------------------------------------------- registration, autocast

_library: torch.library.Library | None = None


def _register() -> None:
    global _library
    _library = torch.library.Library("dynconv_ext", "FRAGMENT")
    for name, fake, function in (
        ("aggregate_kernels", _fake_aggregate, AggregateKernelsFunction),
        ("aggregate_kernels_backward", _fake_aggregate_backward, AggregateKernelsBackwardFunction),
        ("dynamic_conv2d", _fake, DynamicConv2dFunction),
        ("dynamic_conv2d_backward", _fake_backward, DynamicConv2dBackwardFunction),
    ):
        register_operator(_library, name, fake, function)
    # Attention keeps its dtype: the softmax is computed in float32 anyway.
    register_autocast(_library, "aggregate_kernels", lowered=(0, 2))
    register_autocast(_library, "dynamic_conv2d", lowered=(0, 1, 3))


if _extension.loaded:
    _register()

# --------------------------------------------------------------------------------------------------------- functions


def _temperature(value: float | None) -> float | None:
    return None if value is None else number("temperature", value, "a number or None")


def aggregate_kernels(
    weight: Tensor, attention: Tensor, bias: Tensor | None = None, temperature: float | None = None
) -> tuple[Tensor, Tensor | None]:
    r"""Mixes a bank of kernels by a sample's attention.

    .. math:: W[n] = \sum_k a[n,k] \; weight[k], \qquad b[n] = \sum_k a[n,k] \; bias[k]

    :func:`dynamic_conv2d` does this without ever holding the kernels of all samples; prefer it where a convolution
    follows.

    Args:
        weight: (K, O, C / groups, kH, kW), the bank of K kernels.
        attention: (N, K). Without a temperature the mixing weights themselves, any real values (sigmoid routing, too).
        bias: (K, O).
        temperature: T > 0: attention are logits and the mixing weights softmax(attention / T).

    float32, float64, bfloat16 and float16; sums are float32 (float64 for float64). Attention may be float32 beside a
    16-bit weight; autocast lowers weight and bias only.

    Returns:
        Always a pair: kernels (N, O, C / groups, kH, kW), and biases (N, O), or None without a bias.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; names the argument, what came and what was expected.
        TypeError: an argument is no tensor, or temperature no number.
        ImportError: the compiled library is missing.

    Example:
        >>> bank = torch.stack([torch.zeros(2, 3, 1, 1), torch.ones(2, 3, 1, 1)])
        >>> kernels, biases = aggregate_kernels(bank, torch.tensor([[0.25, 0.75]]))
        >>> kernels.shape, kernels.unique(), biases
        (torch.Size([1, 2, 3, 1, 1]), tensor([0.7500]), None)

    Source: Yang et al. 2019, arXiv:1904.04971; Chen et al. 2020, arXiv:1912.03458, eq. 2.
    """
    _extension.require()
    check_tensor("weight", weight)
    check_tensor("attention", attention)
    check_tensor("bias", bias, optional=True)
    kernels, biases = torch.ops.dynconv_ext.aggregate_kernels(weight, attention, bias, _temperature(temperature))
    return kernels, None if bias is None else biases


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
    r"""Convolves every sample with its own mix of K kernels.

    .. math::
        W[n] = \sum_k a[n,k] \; weight[k], \quad b[n] = \sum_k a[n,k] \; bias[k], \quad
        out[n] = conv2d(input[n], W[n], b[n])

    The kernels of all samples are never in memory at once, neither here nor in the backward pass, and never saved for
    it.

    Args:
        input: (N, C, H, W), contiguous or channels_last; the output has the same layout.
        weight: (K, O, C / groups, kH, kW), the bank of K kernels.
        attention: (N, K). Without a temperature the mixing weights themselves, any real values (sigmoid routing, too).
        bias: (K, O).
        stride: step of the kernel, in input pixels.
        padding: zeros assumed around the input, in pixels.
        dilation: distance of the taps, in pixels.
        groups: as in torch.nn.functional.conv2d.
        temperature: T > 0: attention are logits and the mixing weights softmax(attention / T).

    float32, float64, bfloat16 and float16; sums are float32 (float64 for float64). Attention may be float32 beside
    16-bit input and weight; autocast lowers input, weight and bias only. On a GPU, float32 products are exact, or
    rounded to TF32 where ``torch.set_float32_matmul_precision`` or ``torch.backends.cuda.matmul.fp32_precision`` allows
    it. Every sum has a fixed order.

    Returns:
        (N, O, Ho, Wo).

    Raises:
        RuntimeError: a shape, dtype or device does not fit; names the argument, what came and what was expected.
        TypeError: an argument is no tensor, no int or pair of ints, or temperature no number.
        ImportError: the compiled library is missing.

    Example:
        >>> x, bank = torch.ones(1, 3, 8, 8), torch.ones(4, 6, 3, 3, 3)
        >>> out = dynamic_conv2d(x, bank, torch.zeros(1, 4), padding=1, temperature=30.0)
        >>> torch.equal(out, nn.functional.conv2d(x, bank[0], padding=1))
        True

    Source: Yang et al. 2019, arXiv:1904.04971, sec. 3; Chen et al. 2020, arXiv:1912.03458, eq. 1-3.
    """
    _extension.require()
    check_tensor("input", input)
    check_tensor("weight", weight)
    check_tensor("attention", attention)
    check_tensor("bias", bias, optional=True)
    if isinstance(groups, bool) or not isinstance(groups, int | torch.SymInt):
        raise TypeError(f"groups: got {groups!r}, expected an int")
    return torch.ops.dynconv_ext.dynamic_conv2d(
        input,
        weight,
        attention,
        bias,
        pair("stride", stride),
        pair("padding", padding),
        pair("dilation", dilation),
        groups,
        _temperature(temperature),
        allow_tf32(input),
    )


# ------------------------------------------------------------------------------------------------------------ module


class DynamicConv2d(ConvLayer, AnnealedTemperature):
    """Dynamic convolution with its attention: squeeze-and-excitation over kernels instead of channels.

    ``attention = softmax(fc2(relu(fc1(mean of input over pixels))) / temperature)``. Drop-in for nn.Conv2d.

    The temperature is a buffer, hence in the state_dict. It starts high, so that all kernels learn, and goes down to 1
    early in training: call :meth:`anneal` once an epoch, or :meth:`set_temperature` for a schedule of your own.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: (kH, kW).
        stride, padding, dilation, groups: as in :func:`dynamic_conv2d`.
        bias: whether to learn a bias for each kernel.
        num_kernels: K.
        reduction: fc1 has max(4, C // reduction) outputs.
        temperature: the temperature to start with.
        device, dtype: of the parameters.

    Attributes:
        weight: (K, O, C / groups, kH, kW).
        bias: (K, O) or None.
        fc1, fc2: the attention's layers.
        temperature: buffer, one number.

    Raises:
        ValueError: a number is out of range, or in_channels or out_channels no multiple of groups; names it.
        TypeError: kernel_size, stride, padding or dilation is no int or pair of ints, or temperature no number.

    Example:
        >>> layer = DynamicConv2d(4, 6, kernel_size=3, padding=1)
        >>> layer(torch.ones(2, 4, 8, 8)).shape
        torch.Size([2, 6, 8, 8])

    Source: Chen et al. 2020, arXiv:1912.03458, sec. 3 and 4.
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
        num_kernels: int = 4,
        reduction: int = 4,
        temperature: float = 30.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        at_least_one(num_kernels=num_kernels, reduction=reduction)
        self.num_kernels = num_kernels
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (num_kernels, out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **options))
        self.bias = nn.Parameter(torch.empty(num_kernels, out_channels, **options)) if bias else None
        hidden = max(4, in_channels // reduction)
        self.fc1 = nn.Linear(in_channels, hidden, **options)
        self.fc2 = nn.Linear(hidden, num_kernels, **options)
        self.register_temperature(temperature, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each kernel and its bias like nn.Conv2d's, the attention like nn.Linear's; the temperature to its start."""
        for kernel in self.weight:
            init.kaiming_uniform_(kernel, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0, 0].numel())
            init.uniform_(self.bias, -bound, bound)
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()
        self.set_temperature(self.initial_temperature)

    def attention(self, input: Tensor) -> Tensor:
        """Logits over the kernels, divided by the temperature; their softmax are the mixing weights.

        Args:
            input: (N, C, H, W).

        Returns:
            (N, K).
        """
        logits = self.fc2(torch.relu(self.fc1(input.mean((2, 3)))))
        # The buffer stays a tensor: reading it as a number would wait for a GPU, and break a compiled graph.
        return logits / self.temperature

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicConv2d:
        # ``to(memory_format=torch.channels_last)`` converts every tensor of 4 or 5 sizes, and fails on 5: the bank
        # goes through flat. It has one layout anyway.
        return super()._apply(lambda t: fn(t.flatten()).unflatten(0, t.shape) if t.dim() == 5 else fn(t), recurse)

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
        return dynamic_conv2d(
            input,
            self.weight,
            self.attention(input),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            temperature=1.0,
        )

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return (
            super().extra_repr() + (", bias=False" if self.bias is None else "") + f", num_kernels={self.num_kernels}"
        )
