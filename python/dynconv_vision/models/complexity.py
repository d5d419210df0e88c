# SPDX-License-Identifier: BSD-3-Clause
"""Parameters and floating-point operations of a network.

``torch.utils.flop_counter`` counts convolutions and matrix products, a multiplication and an addition as one operation
each; norms, activations and poolings count nothing. This module adds the project's operators, by the same rule:

- ``deform_conv2d``: the product with the kernel, 2 N O (C/G) K P; and the sampling, for each of the N C K P values 8
  for the four weighted corners and 1 for the mask. (K taps, P output pixels.)
- ``dynamic_conv2d``: the mixture of K kernels, 2 N K O (C/G) kH kW, the same of the biases, and the convolution.
- The backward operators: the same terms once for every gradient that is computed.

Importing the module registers the formulas, so a ``FlopCounterMode`` of one's own counts the operators, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

import dynconv_ext  # noqa: F401  (defines torch.ops.dynconv_ext)

Shape = Sequence[int]

#: Operations of one bilinear sample: four corners, each weighted and added.
_SAMPLE = 8


def _deform_terms(input: Shape, weight: Shape, out: Shape) -> tuple[int, int]:
    """Operations of the product with the kernel, and the number of sampled values."""
    batch, channels = input[:2]
    pixels = prod(out[2:])
    product = 2 * batch * prod(weight) * pixels
    return product, batch * channels * prod(weight[2:]) * pixels


def deform_conv2d_flops(
    input: Shape,
    offset: Shape,
    weight: Shape,
    bias: Shape | None = None,
    stride: Shape = (1, 1),
    padding: Shape = (0, 0),
    dilation: Shape = (1, 1),
    mask: Shape | None = None,
    *,
    out_shape: Shape,
) -> int:
    """Operations of ``dynconv_ext.deform_conv2d``, from the shapes of its arguments."""
    product, samples = _deform_terms(input, weight, out_shape)
    return product + samples * (_SAMPLE + (mask is not None))


def deform_conv2d_backward_flops(
    grad_out: Shape,
    input: Shape,
    offset: Shape,
    weight: Shape,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    mask: Shape | None,
    output_mask: Sequence[bool],
    *,
    out_shape: object = None,
) -> int:
    """Operations of the backward operator of ``deform_conv2d``, from the shapes of its arguments."""
    product, samples = _deform_terms(input, weight, grad_out)
    masked = int(mask is not None)
    need_input, need_offset, need_weight, _, need_mask = output_mask
    total = 0
    if need_input or need_offset or need_mask:
        total += product  # the gradient of the sampled values
    if need_input:
        total += samples * (_SAMPLE + masked)
    if need_offset:
        total += samples * (2 * _SAMPLE + masked)
    if need_weight:
        total += product + samples * (_SAMPLE + masked)
    if need_mask:
        total += samples * _SAMPLE
    return total


def aggregate_kernels_flops(
    weight: Shape,
    attention: Shape,
    bias: Shape | None = None,
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    """Operations of ``dynconv_ext.aggregate_kernels``, from the shapes of its arguments."""
    batch = attention[0]
    return 2 * batch * (prod(weight) + (prod(bias) if bias else 0))


def dynamic_conv2d_flops(
    input: Shape,
    weight: Shape,
    attention: Shape,
    bias: Shape | None = None,
    *args: object,
    out_shape: Shape,
    **kwargs: object,
) -> int:
    """Operations of ``dynconv_ext.dynamic_conv2d``, from the shapes of its arguments."""
    product = 2 * input[0] * prod(weight[1:]) * prod(out_shape[2:])
    return product + aggregate_kernels_flops(weight, attention, bias)


def aggregate_kernels_backward_flops(
    grad_kernels: Shape,
    grad_biases: Shape | None,
    weight: Shape,
    attention: Shape,
    bias: Shape | None,
    temperature: float | None,
    output_mask: Sequence[bool],
    *,
    out_shape: object = None,
) -> int:
    """Operations of the backward operator of ``aggregate_kernels``, from the shapes of its arguments."""
    need_weight, need_attention, need_bias = output_mask
    of_kernels, of_biases = 2 * attention[0] * prod(weight), 2 * attention[0] * (prod(bias) if bias else 0)
    return of_kernels * (need_weight + need_attention) + of_biases * (need_bias + need_attention)


def dynamic_conv2d_backward_flops(
    grad_out: Shape,
    input: Shape,
    weight: Shape,
    attention: Shape,
    bias: Shape | None,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int,
    temperature: float | None,
    output_mask: Sequence[bool],
    *,
    out_shape: object = None,
) -> int:
    """Operations of the backward operator of ``dynamic_conv2d``, from the shapes of its arguments."""
    need_input, need_weight, need_attention, need_bias = output_mask
    product = 2 * input[0] * prod(weight[1:]) * prod(grad_out[2:])
    total = 0
    if need_input:
        total += product + aggregate_kernels_flops(weight, attention)  # the kernels are not kept, so mixed again
    if need_weight or need_attention:
        total += product  # the gradient of the mixed kernels
    return total + aggregate_kernels_backward_flops(
        (), None, weight, attention, bias, temperature, (need_weight, need_attention, need_bias)
    )


_FORMULAS: dict[str, Callable[..., int]] = {
    "deform_conv2d": deform_conv2d_flops,
    "deform_conv2d_backward": deform_conv2d_backward_flops,
    "aggregate_kernels": aggregate_kernels_flops,
    "aggregate_kernels_backward": aggregate_kernels_backward_flops,
    "dynamic_conv2d": dynamic_conv2d_flops,
    "dynamic_conv2d_backward": dynamic_conv2d_backward_flops,
}


def _register_formulas() -> None:
    """Register what is not registered yet; without the compiled library there are no operators to register."""
    for name, formula in _FORMULAS.items():
        target = getattr(torch.ops.dynconv_ext, name, None)
        if target is not None and target not in flop_registry:
            register_flop_formula(target)(formula)


_register_formulas()


def count_parameters(model: nn.Module) -> int:
    """Number of parameters that are trained.

    Args:
        model: The network; parameters with ``requires_grad`` count, shared ones once.

    Returns:
        The number of scalars.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_flops(model: nn.Module, input_shape: Sequence[int] | None = None) -> int:
    """Floating-point operations of one forward pass in evaluation mode, multiplications and additions apart.

    The pass is run on zeros, by a copy of the network.

    Args:
        model: The network.
        input_shape: Shape of the input; ``(1, 3, S, S)`` with S = ``model.image_size`` if None.

    Returns:
        The number of operations, for the whole input.

    Raises:
        ValueError: If ``input_shape`` is None and the network has no ``image_size``.

    Example:
        >>> count_flops(nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 10)) == 2 * 3 * 3 * 3 * 8 * 10 * 10
        True
    """
    if input_shape is None:
        size = getattr(model, "image_size", None)
        if size is None:
            raise ValueError(
                "input_shape: got None, expected a shape such as (1, 3, 64, 64): the model has no image_size"
            )
        input_shape = (1, 3, size, size)
    reference = next(model.parameters(), torch.empty(0))
    x = torch.zeros(tuple(input_shape), device=reference.device, dtype=reference.dtype)
    devices = [x.device] if x.device.type == "cuda" else []
    _register_formulas()
    # A copy and a fork: neither batch norm nor what a network keeps from its inputs nor random state may change.
    probe = copy.deepcopy(model).eval()
    with torch.random.fork_rng(devices=devices), torch.no_grad(), FlopCounterMode(display=False) as counter:
        probe(x)
    return counter.get_total_flops()
