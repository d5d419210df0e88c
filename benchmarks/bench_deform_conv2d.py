# SPDX-License-Identifier: BSD-3-Clause
"""deform_conv2d against torchvision, ONNX Runtime, the reference, and an ordinary convolution of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dynconv_ext import deform_conv2d, reference
from timed import DIRECTIONS, DTYPES

# batch, channels, size, output channels; kernel 3, padding 1, mask, one offset group
CASES = {
    "8x64x31x31-128": (8, 64, 31, 128),
    "32x64x31x31-128": (32, 64, 31, 128),
    "4x256x28x28-256": (4, 256, 28, 256),
    "2x128x56x56-128": (2, 128, 56, 128),
}
# The reference holds all columns: it is timed on the smallest case only.
IMPLS = [
    "ours",
    "conv2d",
    "ours_channels_last",
    "conv2d_channels_last",
    "ours_float32",
    "torchvision",
    "onnxruntime",
    "reference",
]


def tensors(case: str, dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
    """input, offset, weight, bias, mask, gradient of the output. Offsets and masks are float32, as a network's are."""
    batch, channels, size, out_channels = CASES[case]
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    x = normal(batch, channels, size, size).to(dtype)
    weight = (normal(out_channels, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype)
    grad = normal(batch, out_channels, size, size).to(dtype)
    if channels_last:
        x, weight, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, grad))
    offset, mask = normal(batch, 18, size, size), torch.rand(batch, 9, size, size, generator=random)
    return [x, offset, weight, normal(out_channels).to(dtype), mask, grad]


def onnx_session(values: list[Tensor]) -> Callable[[], Any]:
    """ONNX Runtime's DeformConv (opset 22), on as many threads as torch uses."""
    # Only here: benchmarks on a GPU use the rest of this module, and need neither.
    import onnx
    import onnxruntime

    x, offset, weight, bias, mask, _ = (t.numpy() for t in values)
    inputs = {"X": x, "W": weight, "offset": offset, "B": bias, "mask": mask}
    node = onnx.helper.make_node("DeformConv", list(inputs), ["Y"], pads=[1, 1, 1, 1])
    graph = onnx.helper.make_graph(
        [node],
        "deform",
        [onnx.helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, v.shape) for k, v in inputs.items()],
        [onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would otherwise spin on while the next contender is timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def ours(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)


def peer(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return torchvision.ops.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)


def plain(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.conv2d(x, weight, bias, padding=1, groups=x.shape[1] // weight.shape[1])


def slow(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return reference.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)


def contenders(case: str, dtype: torch.dtype, direction: str) -> dict[str, Callable[[], Any]]:
    make = DIRECTIONS[direction]
    values, last = tensors(case, dtype, False), tensors(case, dtype, True)
    found = {
        "ours": make(ours, values),
        "conv2d": make(plain, values),
        "ours_channels_last": make(ours, last),
        "conv2d_channels_last": make(plain, last),
    }
    if dtype == torch.float32:
        found["torchvision"] = make(peer, values)
        if direction == "forward":
            found["onnxruntime"] = onnx_session(values)
        if case == next(iter(CASES)):
            found["reference"] = make(slow, values)
    else:
        found["ours_float32"] = make(ours, tensors(case, torch.float32, False))
    return found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_deform_conv2d(race, case, direction, dtype, impl):
    race(
        lambda: contenders(case, DTYPES[dtype], direction),
        impl,
        op="deform_conv2d",
        case=case,
        dtype=dtype,
        direction=direction,
    )
