# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions of small maps as matrix products, for training in bfloat16 on a CPU.

oneDNN's weight gradient is slow where kernels are large and maps small: in the last stage of ResNet at 64 pixels (512
channels on 2x2 or 4x4, batch 128) it takes three to five times as long as the forward pass, at equal operations. As a
matrix product over gathered windows it takes as long as that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

# By measurement: below, there are too few channels to fill a product; above, gathering costs what the product saves.
_MIN_CHANNELS = 64
_MAX_PIXELS = 16


def use_matmul_convolutions(model: nn.Module) -> None:
    """Let the ungrouped, undilated convolutions of `model` run as matrix products where their output maps are small.

    Results are those of `torch.conv2d` up to rounding. Layers keep their parameters and names.
    """
    for module in model.modules():
        if (
            type(module) is nn.Conv2d
            and module.groups == 1
            and module.dilation == (1, 1)
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and module.bias is None
            and module.in_channels >= _MIN_CHANNELS
        ):
            module.__class__ = _MatmulConv2d


class _MatmulConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[2:], self.kernel_size, self.padding, self.stride, strict=True)
        height, width = ((size + 2 * pad - kernel) // stride + 1 for size, kernel, pad, stride in sizes)
        if not 1 <= height * width <= _MAX_PIXELS or x.device.type != "cpu":
            return super().forward(x)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            x, weight = (each.to(torch.get_autocast_dtype("cpu")) for each in (x, weight))
        return _MatmulConv.apply(x, weight, self.stride, self.padding)


class _MatmulConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        pad_y, pad_x = padding
        out_channels, _, kernel_height, kernel_width = weight.shape
        padded = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, pad_x, pad_x, pad_y, pad_y))
        # (N, height, width, C, kernel_height, kernel_width), a view
        windows = padded.unfold(1, kernel_height, stride[0]).unfold(2, kernel_width, stride[1])
        batch, height, width = windows.shape[:3]
        columns = windows.permute(0, 1, 2, 4, 5, 3).reshape(batch * height * width, -1)
        matrix = weight.permute(0, 2, 3, 1).reshape(out_channels, -1)
        ctx.save_for_backward(columns, matrix)
        ctx.shapes = (tuple(padded.shape), tuple(weight.shape), (height, width), stride, padding)
        return (columns @ matrix.t()).view(batch, height, width, out_channels).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        columns, matrix = ctx.saved_tensors
        padded, (out_channels, channels, kernel_height, kernel_width), (height, width), stride, padding = ctx.shapes
        rows = grad.permute(0, 2, 3, 1).reshape(-1, out_channels)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            flat = (rows.t() @ columns).view(out_channels, kernel_height, kernel_width, channels)
            grad_weight = flat.permute(0, 3, 1, 2)
        if ctx.needs_input_grad[0]:
            taps = (rows @ matrix).view(padded[0], height, width, kernel_height, kernel_width, channels)
            total = taps.new_zeros(padded)
            for i in range(kernel_height):
                for j in range(kernel_width):
                    last_y, last_x = i + (height - 1) * stride[0] + 1, j + (width - 1) * stride[1] + 1
                    total[:, i : last_y : stride[0], j : last_x : stride[1]] += taps[:, :, :, i, j]
            pad_y, pad_x = padding
            inner = total[:, pad_y : padded[1] - pad_y, pad_x : padded[2] - pad_x]
            grad_x = inner.permute(0, 3, 1, 2)
        return grad_x, grad_weight, None, None
