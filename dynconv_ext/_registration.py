# SPDX-License-Identifier: BSD-3-Clause
"""What the operators' Python faces share: pairs, sizes, layouts, gradients, autocast, double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynconv_ext import _extension


def is_whole(value: Any) -> bool:
    """Whether an argument is a whole number, symbolic ones included; a bool is none."""
    return isinstance(value, torch.SymInt) or hasattr(value, "__index__") and not isinstance(value, bool | Tensor)


def pair(name: str, value: int | Sequence[int]) -> list[int]:
    """(height, width) of an argument given as one number or two.

    Raises:
        TypeError: value is neither; names the argument.
    """
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if len(values) in (1, 2) and all(is_whole(each) for each in values):
        return [values[0], values[-1]]
    raise TypeError(f"{name}: got {value!r}, expected an int or a pair of ints (height, width)")


def number(name: str, value: Any, expected: str = "a number") -> float:
    """A real number as a float.

    Raises:
        TypeError: value is none; names the argument and says what was expected.
    """
    if isinstance(value, bool | str | Tensor) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: got {value!r}, expected {expected}")
    return float(value)


def check_tensor(name: str, value: Any, optional: bool = False) -> None:
    """Raises TypeError unless value is a tensor (or None, if optional)."""
    if not (isinstance(value, Tensor) or optional and value is None):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor{' or None' if optional else ''}")


def check_same_device(like: Tensor, like_name: str = "input", /, **others: Tensor | None) -> None:
    """Raises RuntimeError unless every tensor is on the device of like, the argument called like_name.

    The kernels check this themselves; fake kernels must, since a call with one meta tensor comes to them.
    """
    for name, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise RuntimeError(
                f"{name}: got a tensor on {tensor.device}, expected the device of {like_name}, {like.device}"
            )


def is_channels_last(tensor: Tensor) -> bool:
    """The library's rule for the layout of an output; the C++ side has the same."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def empty_like_layout(like: Tensor, shape: Sequence[Any]) -> Tensor:
    """An output of like's dtype, device and layout (contiguous or channels_last)."""
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def output_size(
    input: Tensor, kernel: Sequence[Any], stride: Sequence[Any], padding: Sequence[Any], dilation: Sequence[Any]
) -> tuple[Any, Any]:
    """(Ho, Wo) of a convolution of input (N, C, H, W); sizes may be symbolic."""
    height, width = (
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return height, width


def empty_if(wanted: bool, like: Tensor, shape: Sequence[Any]) -> Tensor:
    """An output of like's dtype and device: of the given shape, or of no elements where it is not wanted."""
    return like.new_empty(tuple(shape) if wanted else (0,))


def empty_input_gradient(wanted: bool, input: Tensor) -> Tensor:
    """A fake backward's gradient of the operator's input, which has the input's layout."""
    return empty_like_layout(input, input.shape) if wanted else input.new_empty((0,))


def only_wanted(grads: Sequence[Tensor | None], output_mask: Sequence[bool]) -> list[Tensor | None]:
    """Gradients with None in place of those that were not wanted."""
    return [g if wanted else None for g, wanted in zip(grads, output_mask, strict=True)]


@torch.compiler.assume_constant_result
def _matmul_allows_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def allow_tf32(input: Tensor) -> bool:
    """Whether torch's settings let the products of a float32 operator on a GPU be done in TF32."""
    return input.is_cuda and input.dtype == torch.float32 and _matmul_allows_tf32()


def register_operator(
    library: torch.library.Library, name: str, fake: Callable[..., Any], function: type[torch.autograd.Function]
) -> None:
    """Gives an operator its fake kernel, and its autograd Function as autograd formula.

    Without the CUDA library it gets a CUDA kernel that raises a readable error in place of the dispatcher's.
    """
    qualified = f"dynconv_ext::{name}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA"):
        library.impl(name, _extension.no_cuda(name), "CUDA")
    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_autograd(qualified, function.backward, setup_context=function.setup_context, lib=library)


def register_autocast(library: torch.library.Library, name: str, lowered: Sequence[int]) -> None:
    """Under autocast, the arguments at the given positions are cast to autocast's dtype; the others stay as they are.

    float64 stays float64, as in torch's own autocast.
    """
    operator = getattr(torch.ops.dynconv_ext, name).default

    def rule(device: str, key: torch._C.DispatchKey) -> Callable[..., Any]:
        def cast_and_call(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            values = list(args)
            for i in lowered:
                if isinstance(values[i], Tensor) and values[i].is_floating_point() and values[i].dtype != torch.float64:
                    values[i] = values[i].to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return operator(*values)

        return cast_and_call

    library.impl(name, rule("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
    library.impl(name, rule("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")


def double_backward(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad_out: Tensor, grads: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], Tensor | None]:
    """Gradients of an operator's backward, through the operator's reference formula.

    Args:
        formula: the reference, of ``inputs``.
        inputs: the operator's tensors, None where absent.
        grad_out: the gradient that went into the backward.
        grads: gradients with respect to the backward's outputs, one an input; None where not used.

    Returns:
        Gradients with respect to the inputs, and with respect to grad_out. They are differentiable in turn.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A tensor that has a graph keeps it, for gradients of a still higher order.
        leaves = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs
        ]
        seed = grad_out.view_as(grad_out) if grad_out.requires_grad else grad_out.detach().requires_grad_()
        chosen = [i for i, g in enumerate(grads) if g is not None and leaves[i] is not None]
        if not chosen:
            return [None] * len(leaves), None
        out = formula(*leaves)
        first = torch.autograd.grad(out, [leaves[i] for i in chosen], seed, create_graph=True)
        wanted = [t for t in (*leaves, seed) if t is not None]
        second = torch.autograd.grad(
            first, wanted, [grads[i] for i in chosen], create_graph=create_graph, allow_unused=True
        )
    results = iter(second)
    return [None if t is None else next(results) for t in leaves], next(results)
