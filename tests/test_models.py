# SPDX-License-Identifier: BSD-3-Clause
"""The networks: published figures, learning, the stem's laws, counting, error texts."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynconv_ext
from dynconv_vision.models import (
    CBAM,
    ChannelNorm,
    StaticChannelConv,
    VariableInputConv,
    count_flops,
    count_parameters,
    create_model,
    list_models,
    register_model,
    sample_channel_sets,
    sample_channels,
)
from dynconv_vision.models.layout import MapNorm, pixel_maxima, pixel_means
from dynconv_vision.models.registry import _MODELS
from dynconv_vision.models.variable_input_conv import imputation_shares

TASK1 = ["resnet18", "static_resnet18", "task1_published", "variable_resnet18"]
TASK2 = ["four_conv", "resnet34", "task2_published"]


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    """Cases this small lose more than they gain by threads, most of all beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# Registry


def test_registry_lists_the_networks_of_each_task() -> None:
    assert sorted(list_models("task1")) == sorted(list_models(1)) == TASK1
    assert sorted(list_models("task2")) == TASK2
    assert set(TASK1 + TASK2) <= set(list_models())


def test_register_model_adds_a_network() -> None:
    @register_model("just_for_this_test", task=2)
    def build(num_classes: int, image_size: int, width: int = 3) -> nn.Module:
        return nn.Linear(width, num_classes)

    try:
        assert "just_for_this_test" in list_models("task2")
        assert "just_for_this_test" not in list_models("task1")
        assert create_model("just_for_this_test", num_classes=7, width=5).weight.shape == (7, 5)
        with pytest.raises(ValueError, match="name: the model 'just_for_this_test' is already registered"):
            register_model("just_for_this_test")
    finally:
        del _MODELS["just_for_this_test"]


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"name": "task2_publshed"}, ValueError, "name: got 'task2_publshed'.*did you mean 'task2_published'"),
        ({"name": "??"}, ValueError, "Known models: four_conv, resnet18, resnet34, "),
        (
            {"name": "resnet18", "pretrained": True},
            ValueError,
            "pretrained: no trained weights of 'resnet18' come with",
        ),
        ({"name": "resnet18", "pretrained": "/nowhere"}, ValueError, "/nowhere is not a file"),
        ({"name": "resnet18", "num_classes": 0}, ValueError, "num_classes: got 0, expected a positive integer"),
        ({"name": "resnet18", "image_size": 6.5}, ValueError, "image_size: got 6.5, expected a positive integer"),
        ({"name": "resnet18", "kernels": 4}, TypeError, "kernels: no option of the model 'resnet18'.* stem"),
        ({"name": "resnet18", "stem": "large"}, ValueError, "stem: got 'large', expected 'small', 'torchvision'"),
        ({"name": "task2_published", "image_size": 6}, ValueError, "image_size: got 6, expected at least 7"),
    ],
)
def test_create_model_explains_bad_input(kwargs: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        create_model(**kwargs)


def test_list_models_explains_an_unknown_task() -> None:
    with pytest.raises(ValueError, match="task: got 'task3', expected one of 'task1', 'task2'"):
        list_models("task3")


# Published figures


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("task2_published", {"image_size": 128}, 1_109_879),
        ("task2_published", {"image_size": 124}, 1_053_431),
        ("resnet34", {}, 21_310_322),
        ("resnet34", {"layers": (2, 2, 2, 2)}, 11_202_162),
        ("resnet18", {"stem": "torchvision"}, 11_202_162),
        ("resnet18", {}, 11_202_162 - 64 * 3 * 7 * 7 + 64 * 3 * 3 * 3),
        # The report's 11,192,775 are these and the 21 attention weights that a forward pass draws.
        ("task1_published", {}, 11_192_775 - 21),
        ("static_resnet18", {}, 11_202_162 - 64 * 3 * 7 * 7 + 64 * 3 * 3 * 3),
        # K kernels, four identities, three gains; attention: Linear 10 -> 16 -> 4; residual: Linear 17 -> 32 -> 576.
        (
            "variable_resnet18",
            {},
            11_192_775
            - 21
            + 4 * 64 * 3 * 3 * 3
            + 4 * 8
            + 3
            + (10 * 16 + 16)
            + (16 * 4 + 4)
            + (17 * 32 + 32)
            + 32 * 576,
        ),
    ],
)
def test_parameters(name: str, options: dict, parameters: int) -> None:
    assert count_parameters(create_model(name, num_classes=50, **options)) == parameters


def test_count_parameters_leaves_frozen_ones_out() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    network[0].requires_grad_(False)
    assert count_parameters(network) == 15


def test_task2_published_has_the_published_names() -> None:
    expected = {
        "layer1.weight": (64, 3, 5, 5),
        "layer1.bias": (64,),
        "attention1.attention.0.weight": (8, 64, 1, 1),
        "attention1.attention.0.bias": (8,),
        "attention1.attention.2.weight": (64, 8, 1, 1),
        "attention1.attention.2.bias": (64,),
        "bn1.weight": (64, 62, 62),
        "bn1.bias": (64, 62, 62),
        "layer2.weight": (64, 64, 3, 3),
        "layer2.bias": (64,),
        "bn.weight": (64, 31, 31),
        "bn.bias": (64, 31, 31),
        "layer3.weight": (64, 64, 3, 3),
        "layer3.bias": (64,),
        "layer4.offset_conv.weight": (18, 64, 3, 3),
        "layer4.offset_conv.bias": (18,),
        "layer4.modulator_conv.weight": (9, 64, 3, 3),
        "layer4.modulator_conv.bias": (9,),
        "layer4.regular_conv.weight": (128, 64, 3, 3),
        "layer4.regular_conv.bias": (128,),
        "attention2.sam.conv.weight": (1, 2, 7, 7),
        "attention2.cam.linear.0.weight": (64, 128),
        "attention2.cam.linear.0.bias": (64,),
        "attention2.cam.linear.2.weight": (128, 64),
        "attention2.cam.linear.2.bias": (128,),
        "bn2.weight": (128, 31, 31),
        "bn2.bias": (128, 31, 31),
        "fc1.weight": (50, 128),
        "fc1.bias": (50,),
    }
    network = create_model("task2_published", image_size=124)
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == expected


def test_task2_published_starts_as_a_plain_convolution() -> None:
    """Zero offsets and a mask of 2 sigmoid(0) = 1: the whole network against its formula in plain torch."""
    network = create_model("task2_published", num_classes=5, image_size=20).eval()
    x = torch.randn(2, 3, 20, 20)
    seen = {}
    for name in ("layer1", "bn1", "pool1", "layer3", "layer4", "pool2"):
        getattr(network, name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
    with torch.no_grad():
        logits = network(x)
        layer4 = network.layer4.regular_conv
        torch.testing.assert_close(
            seen["layer4"][1], F.conv2d(seen["layer3"][1], layer4.weight, layer4.bias, padding=1), atol=1e-5, rtol=1e-5
        )
        # Attention comes after the norm and the activation.
        gelu = F.gelu(seen["bn1"][1])
        gate = torch.sigmoid(network.attention1.attention[2](F.relu(network.attention1.attention[0](gelu))))
        torch.testing.assert_close(seen["pool1"][0], gelu * gate)
        expected = network.fc1(seen["pool2"][1].mean(dim=(2, 3)))
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert seen["layer1"][1].shape == (2, 64, 10, 10)
    assert seen["pool2"][1].shape == (2, 128, 2, 2)


@pytest.mark.parametrize(("size", "half", "quarter", "eighth"), [(124, 62, 31, 15), (64, 32, 16, 8), (21, 11, 5, 2)])
def test_task2_published_sizes(size: int, half: int, quarter: int, eighth: int) -> None:
    network = create_model("task2_published", num_classes=2, image_size=size).eval()
    sizes = []
    for layer in (network.layer1, network.pool1, network.layer4, network.pool2):
        layer.register_forward_hook(lambda _, __, out: sizes.append(out.shape[-1]))
    with torch.no_grad():
        assert network(torch.zeros(1, 3, size, size)).shape == (1, 2)
    assert sizes == [half, quarter, quarter, eighth]


def test_map_norm_is_layer_norm_and_keeps_channels_last() -> None:
    plain, ours = nn.LayerNorm([6, 5, 4]).double(), MapNorm([6, 5, 4]).double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(plain.state_dict())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 6, 5, 4, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
        out, expected = ours(x), plain(x)
        assert out.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(out, expected)
        weight = torch.randn_like(out)
        got = torch.autograd.grad((out * weight).sum(), [x, ours.weight, ours.bias])
        torch.testing.assert_close(got, torch.autograd.grad((expected * weight).sum(), [x, plain.weight, plain.bias]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_statistics_of_pixels_and_the_format_of_their_gradients(memory_format: torch.memory_format) -> None:
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    for statistic, expected in ((pixel_means, x.mean((2, 3))), (pixel_maxima, x.amax((2, 3)))):
        out = statistic(x)
        torch.testing.assert_close(out, expected)
        weight = torch.randn_like(out)
        (got,) = torch.autograd.grad((out * weight).sum(), x)
        (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
        torch.testing.assert_close(got, wanted)
        assert got.is_contiguous(memory_format=memory_format)


def test_cbam_formula() -> None:
    block = CBAM(6, reduction=2).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    mlp, conv = block.cam.linear, block.sam.conv
    cam = torch.empty_like(x)
    for n, c in itertools.product(range(2), range(6)):
        gate = mlp(x[n].flatten(1).max(1).values)[c] + mlp(x[n].flatten(1).mean(1))[c]
        cam[n, c] = x[n, c] * torch.sigmoid(gate)
    summary = torch.stack((cam.max(1).values, cam.mean(1)), 1)
    torch.testing.assert_close(block(x), torch.sigmoid(conv(summary)) * cam + x)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 1, 24, 24), (3, 24, 24)])
def test_task2_published_explains_a_wrong_size(shape: tuple[int, ...]) -> None:
    network = create_model("task2_published", image_size=24)
    with pytest.raises(
        ValueError, match=r"x: got shape .*expected \(N, 3, image_size, image_size\) with image_size = 24"
    ):
        network(torch.zeros(shape))


# Every network learns, checkpoints and copies


@pytest.mark.parametrize("name", TASK1 + TASK2)
def test_networks_learn(name: str) -> None:
    network = create_model(name, num_classes=3, image_size=16)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    # Where task1_published gets to in so few steps is chance: it sees another projection of the images in each.
    if name != "task1_published":
        assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    without_gradient = [key for key, value in network.named_parameters() if value.grad is None]
    assert without_gradient == []


@pytest.mark.parametrize("name", TASK1 + TASK2)
def test_networks_survive_a_checkpoint(name: str) -> None:
    network = create_model(name, num_classes=3, image_size=16).eval()
    keys = list(network.state_dict())
    if name in ("task1_published", "static_resnet18", "variable_resnet18"):
        for channels in ("R", "GB", "RGB"):
            network(torch.randn(2, len(channels), 16, 16), channels=tuple(channels))
    assert list(network.state_dict()) == keys, "inputs must not change the parameters"
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    loaded = create_model(name, num_classes=3, image_size=16).eval()
    loaded.load_state_dict(torch.load(file))
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    copy.deepcopy(network)
    if name != "task1_published":
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(loaded(x), network(x))


@pytest.mark.parametrize("stem", ["small", "torchvision"])
def test_resnet_stems(stem: str) -> None:
    network = create_model("resnet18", stem=stem)
    size = {"small": 32, "torchvision": 16}[stem]
    assert network.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 64, size, size)


def test_resnet_takes_a_stem_of_ones_own() -> None:
    network = create_model("resnet34", num_classes=4, stem=nn.Conv2d(1, 64, 5)).eval()
    assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize("name", [*TASK1, "resnet34"])
def test_resnets_can_be_smaller(name: str) -> None:
    network = create_model(name, num_classes=4, layers=(1, 1, 2, 1), width=8).eval()
    assert [len(getattr(network, f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 1, 2, 1]
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert {module.out_channels for module in convolutions} == {8, 16, 32, 64}
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 4)


@pytest.mark.parametrize("name", [*TASK1, "resnet34"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layers": (3, 4, 6)}, r"layers: got \(3, 4, 6\), expected four positive integers"),
        ({"layers": (3, 4, 6, 0)}, r"layers: got \(3, 4, 6, 0\), expected four positive integers"),
        ({"width": 0}, "width: got 0, expected a positive integer"),
        ({"width": 6.5}, "width: got 6.5, expected a positive integer"),
    ],
)
def test_resnets_explain_wrong_sizes(name: str, options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        create_model(name, **options)


# Ours in Task II


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"convolutions": ("deformable", "dynamic", "plain", "dynamic"), "num_kernels": 2},
        {"modulation": False, "attention": "none", "offset_groups": 4},
        {"attention": "pixel", "norm": "group", "kernel_sizes": (7, 1, 3, 5)},
        {"attention": "cbam", "pooling": "mean", "levels": 4},
        {"widths": (8, 16, 24, 8), "levels": 1, "dropout": 0.0},
    ],
)
def test_four_conv_takes_images_of_any_size(options: dict) -> None:
    network = create_model("four_conv", num_classes=5, **options).eval()
    for height, width in ((64, 64), (33, 20), (8, 8)):
        x = torch.randn(2, 3, height, width)
        out = network(x)
        assert out.shape == (2, 5)
        # One image's answer does not depend on its neighbours.
        torch.testing.assert_close(network(x[1:]), out[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [64, 33])
def test_four_conv_with_norms_over_maps_takes_one_size(size: int) -> None:
    network = create_model("four_conv", num_classes=5, image_size=size, norm="map").eval()
    assert network(torch.randn(2, 3, size, size)).shape == (2, 5)
    expected = r"x: got maps of shape \(2, 64, .*, expected \(N, 64, .*build the network with the image_size"
    with pytest.raises(ValueError, match=expected):
        network(torch.randn(2, 3, size + 8, size))


@pytest.mark.parametrize("options", [{}, {"kernel_sizes": (7, 5, 3, 3)}])
def test_four_conv_has_four_convolutions_and_keeps_its_budget(options: dict) -> None:
    network = create_model("four_conv", **options)
    predicting = ("offset_conv", "modulator_conv")
    convolutions = [
        (name, type(layer).__name__)
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Conv2d, dynconv_ext.DynamicConv2d)) and not name.endswith(predicting)
    ]
    # Those of a deformable layer: its own weight, and what predicts its offsets, which the task does not count.
    assert len(convolutions) == 4
    assert count_parameters(network) <= 1.2e6
    flops = count_flops(network, (1, 3, 64, 64))
    assert flops < count_flops(create_model("resnet34"), (1, 3, 64, 64))


def test_four_conv_classifies_statistics_of_its_last_maps() -> None:
    network = create_model("four_conv", num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    third = network.stages[2](network.stages[1](network.stages[0](x)))
    fourth = network.stages[3](third)
    wanted = torch.cat([each for y in (third, fourth) for each in (y.mean((2, 3)), y.amax((2, 3)))], 1)
    torch.testing.assert_close(network.features(x), wanted)
    torch.testing.assert_close(network(x), network.fc(network.norm(wanted)))


def test_variable_resnet18_comes_with_trained_weights() -> None:
    """They take any channels; the correlations are those of photographs, the generated residual has left its zero."""
    network = create_model("variable_resnet18", pretrained=True).eval()
    assert network.fc.out_features == 50
    x = torch.rand(2, 3, 64, 64)
    for channels in (("R",), ("B", "G"), ("G", None, "R")):
        logits = network(x[:, : len(channels)], channels)
        assert logits.shape == (2, 50)
        assert torch.isfinite(logits).all()
    correlation = network.conv1.correlation
    assert ((0.5 < correlation) & (correlation < 1))[~torch.eye(3, dtype=torch.bool)].all()
    assert network.conv1.generator.fc2.weight.abs().mean() > 1e-3


def test_four_conv_comes_with_trained_weights() -> None:
    """They take any size; on a picture, every layer's offsets have left their start at zero."""
    network = create_model("four_conv", pretrained=True).eval()
    assert network.fc.out_features == 50
    assert network(torch.rand(1, 3, 96, 80)).shape == (1, 50)
    for stage in (2, 3):
        assert network.stages[stage].conv.offset_conv.weight.abs().mean() > 1e-3
    fewer = {"num_classes": 10}
    with pytest.raises(ValueError, match="pretrained: the weights of 'four_conv' do not fit"):
        create_model("four_conv", pretrained=True, **fewer)


def test_four_conv_anneals_its_dynamic_convolutions() -> None:
    network = create_model("four_conv", convolutions=("plain", "dynamic", "plain", "plain"), num_kernels=3)
    assert network.stages[1].conv.weight.shape == (3, 128, 64, 3, 3)
    assert hasattr(network.stages[1].conv, "anneal")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"widths": (8, 8, 8)}, "widths: got (8, 8, 8), expected four positive multiples of 8"),
        ({"widths": (8, 8, 8, 12)}, "widths: got (8, 8, 8, 12)"),
        ({"convolutions": ("plain",) * 3}, "convolutions: got ('plain', 'plain', 'plain'), expected four out of"),
        (
            {"convolutions": ("plain", "plain", "plain", "round")},
            "convolutions: got ('plain', 'plain', 'plain', 'round'",
        ),
        ({"attention": "self"}, "attention: got 'self', expected one of none, channel, pixel, cbam"),
        ({"kernel_sizes": (5, 3, 3)}, "kernel_sizes: got (5, 3, 3), expected four odd numbers"),
        ({"kernel_sizes": (5, 4, 3, 3)}, "kernel_sizes: got (5, 4, 3, 3)"),
        ({"norm": "layer"}, "norm: got 'layer', expected one of batch, group, map"),
        ({"pooling": "max"}, "pooling: got 'max', expected one of mean, mean_max"),
        ({"levels": 5}, "levels: got 5, expected one of 1, 2, 3, 4"),
    ],
)
def test_four_conv_explains_wrong_arguments(options: dict, text: str) -> None:
    with pytest.raises(ValueError) as error:
        create_model("four_conv", **options)
    assert text in str(error.value)


# The published Task I network and its defect


def test_task1_published_draws_its_kernels_anew() -> None:
    stem = create_model("task1_published").conv1
    x = torch.randn(2, 3, 8, 8)
    assert not torch.allclose(stem(x), stem(x))
    assert list(stem.parameters()) == list(stem.buffers()) == []


def test_task1_published_draws_a_new_attention_when_the_channel_count_changes() -> None:
    stem = create_model("task1_published").conv1
    rgb, red = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 8, 8)
    stem(rgb)
    first = stem._attention
    stem(rgb)
    assert stem._attention is first
    assert sum(weight.numel() for weight in first) == stem.num_drawn_weights(3) == 21
    stem(red)
    assert sum(weight.numel() for weight in stem._attention) == stem.num_drawn_weights(1) == 5
    stem(rgb)
    assert not torch.equal(stem._attention[0], first[0])


def test_task1_published_mixes_by_the_published_formula() -> None:
    stem = create_model("task1_published").conv1
    x = torch.randn(2, 2, 6, 5)
    stem(x)  # draws the attention
    torch.manual_seed(1)
    out = stem(x)
    torch.manual_seed(1)
    kernels = torch.empty(4, 64, 2, 3, 3).uniform_(-((6 / 18) ** 0.5), (6 / 18) ** 0.5)
    reduce, expand = stem._attention
    attention = torch.softmax(F.relu(x.mean((2, 3)) @ reduce.T) @ expand.T / 30, dim=1)
    for n in range(2):
        kernel = sum(attention[n, k] * kernels[k] for k in range(4))
        torch.testing.assert_close(out[n : n + 1], F.conv2d(x[n : n + 1], kernel, padding=1), atol=1e-5, rtol=1e-5)


def test_task1_published_explains_wrong_channels() -> None:
    network = create_model("task1_published")
    with pytest.raises(ValueError, match=r"x: got shape \(1, 4, 8, 8\), expected \(N, 1 to 3 channels, H, W\)"):
        network(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"channels: got \('R',\), expected 2 names"):
        network(torch.zeros(1, 2, 8, 8), channels=("R",))


# Channels: names, drawn sets, normalisation, static stem


def test_sample_channels_draws_the_number_first() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = Counter(sample_channels(("R", "G", "B"), generator) for _ in range(3000))
    drawn = sample_channel_sets(3000, 3, generator)
    assert drawn.shape == (3000, 3) and drawn.dtype == torch.bool
    by_sample = Counter(tuple(itertools.compress("RGB", row)) for row in drawn.tolist())
    for counted in (draws, by_sample):
        for count in (1, 2, 3):
            sets = [names for names in counted if len(names) == count]
            assert abs(sum(counted[names] for names in sets) - 1000) < 120
            for names in sets:
                assert abs(counted[names] - 1000 / len(sets)) < 90
        assert set(counted) == {names for count in (1, 2, 3) for names in itertools.combinations("RGB", count)}
    full = sample_channel_sets(3000, 3, generator, full_share=0.4).all(1).float().mean()
    assert full == pytest.approx(0.4 + 0.6 / 3, abs=0.04)
    with pytest.raises(ValueError, match="channels: got none"):
        sample_channels(())


def test_channel_norm_knows_channels_by_name() -> None:
    norm = ChannelNorm(("R", "G"))
    norm.set_statistics({"G": (0.5, 0.1), "R": (0.2, 2.0), "other": (0.0, 0.0)})
    x = torch.rand(3, 2, 4, 5)
    torch.testing.assert_close(norm(x[:, [1, 0]], ("G", "R"))[:, [1, 0]], norm(x))
    torch.testing.assert_close(norm(x)[:, 0], (x[:, 0] - 0.2) / 2)
    loaded = ChannelNorm(("R", "G"))
    loaded.load_state_dict(norm.state_dict())
    assert torch.equal(loaded(x), norm(x))
    with pytest.raises(ValueError, match=r"statistics: got \(0.5, 0.0\) for channel 'G', expected \(mean, std\)"):
        norm.set_statistics({"R": (0.2, 2.0), "G": (0.5, 0.0)})


def test_channel_norm_measures_unknown_channels() -> None:
    norm = ChannelNorm()
    x = torch.rand(3, 3, 8, 8) * 7 - 2
    out = norm(x, (None, "B", None))
    torch.testing.assert_close(out[:, 1:2], norm(x[:, 1:2], ("B",)))
    torch.testing.assert_close(out[:, [0, 2]].mean((2, 3)), torch.zeros(3, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, [0, 2]].std((2, 3), correction=0), torch.ones(3, 2), atol=1e-3, rtol=0)
    assert torch.isfinite(norm(torch.ones(1, 1, 2, 2))).all()


def test_static_conv_is_zero_filling_and_scale() -> None:
    conv = StaticChannelConv(4, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, 2, 1))
    filled = x * torch.tensor([3 / 2, 0, 3 / 2])[:, None, None]
    expected = F.conv2d(filled, conv.weight, conv.bias, 2, 1)
    torch.testing.assert_close(conv(x[:, [2, 0]], ("B", "R")), expected)
    present = torch.tensor([[True, False, True], [True, True, True]])
    torch.testing.assert_close(conv(x, present=present), torch.cat((expected[:1], conv(x[1:]))))
    plain = StaticChannelConv(4, 3, rescale=False)
    torch.testing.assert_close(plain(x[:, :1], ("R",)), F.conv2d(x[:, :1], plain.weight[:, :1], plain.bias))
    with pytest.raises(ValueError, match=r"channels: got \('R', None\), expected names out of"):
        conv(x[:, :2], ("R", None))


# VariableInputConv

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (2, 1)},
    {"kernel_size": 1, "stride": 3},
    {"kernel_size": 3, "groups": 2, "padding": 2, "bias": False},
    {"kernel_size": 2, "num_kernels": 1, "residual": False, "gain": False},
    {"kernel_size": 2, "attention": False},
    {"kernel_size": 3, "padding": 1, "imputation": False},
    {"kernel_size": 1, "groups": 2, "imputation": False},
]
NAMES = ("R", "G", "B", "NIR")
SETS = [("NIR", "R"), ("G", "B", "R"), NAMES, ("B",)]


def trained(conv: VariableInputConv) -> VariableInputConv:
    """In double precision, with a residual, gains and some correlation, as after some training."""
    conv = conv.double()
    if conv.correlation is not None:
        conv.set_correlation(torch.randn(len(conv.channels), 7).corrcoef().reshape(conv.correlation.shape))
    with torch.no_grad():
        if conv.generator is not None:
            conv.generator.fc2.weight.normal_()
        if conv.log_gain is not None:
            conv.log_gain.normal_(std=0.3)
    return conv


def mixed_kernels(conv: VariableInputConv, x: torch.Tensor, names: tuple[str, ...]) -> list[nn.Conv2d]:
    """By the formulas of the module's head, sample by sample: a plain convolution over the channels of `names`."""
    place = [conv.channels.index(name) for name in names]
    known, per_group = len(conv.channels), len(conv.channels) // conv.groups
    convs = []
    for sample in x:
        mix = torch.full((conv.num_kernels,), 1 / conv.num_kernels, dtype=x.dtype)
        if conv.attention is not None:
            hidden = 0
            for plane, at in zip(sample, place, strict=True):
                seen = torch.stack((plane.mean(), (plane.var(correction=0) + 1e-6).sqrt()))
                hidden += torch.relu(conv.attention.fc1(torch.cat((seen, conv.identity[at])))) / len(names)
            mix = torch.softmax(conv.attention.fc2(hidden) / conv.temperature, 0)
        table = torch.einsum("k,koihw->oihw", mix, conv.weight)
        weight = table.clone()
        for group in range(conv.groups if conv.correlation is not None else 0):
            members = range(group * per_group, (group + 1) * per_group)
            there, absent = [at for at in members if at in place], [at for at in members if at not in place]
            if there and absent:
                between = conv.correlation[there][:, there] + 0.01 * torch.eye(len(there))
                shares = torch.linalg.solve(between, conv.correlation[there][:, absent])
                outputs = slice(group * len(table) // conv.groups, (group + 1) * len(table) // conv.groups)
                local, others = ([at - group * per_group for at in each] for each in (there, absent))
                passed = torch.einsum("tj,ojhw->othw", shares, table[outputs][:, others])
                for number, at in enumerate(local):
                    weight[outputs, at] += passed[:, number]
        if conv.generator is not None:
            around = conv.identity[place].mean(0)
            for at in range(known):
                seen = torch.cat((conv.identity[at], around, x.new_tensor([len(names) / known])))
                hidden = torch.relu(conv.generator.fc1(seen))
                kernels = conv.generator.fc2(hidden / len(hidden)).view(-1, *conv.kernel_size)
                group, channel = divmod(at, per_group)
                weight[group * len(kernels) : (group + 1) * len(kernels), channel] += kernels
        gain = 1 if conv.log_gain is None else conv.log_gain[len(names) - 1].exp()
        plain = nn.Conv2d(
            known, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
            conv.bias is not None, dtype=x.dtype,
        )  # fmt: skip
        plain.weight.data = weight * gain
        if conv.bias is not None:
            plain.bias.data = mix @ conv.bias * gain
        convs.append(plain)
    return convs


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("names", SETS)
def test_variable_conv_formula(geometry: dict, names: tuple[str, ...]) -> None:
    """Against nn.Conv2d on zero-filled channels, scaled or with imputing kernels, sample by sample."""
    conv = trained(VariableInputConv(6, temperature=2.0, channels=NAMES, **geometry))
    x = torch.randn(2, len(names), 9, 7, dtype=torch.float64)
    full = torch.zeros(2, 4, 9, 7, dtype=torch.float64)
    per_group = 4 // conv.groups
    for plane, name in enumerate(names):
        group = NAMES.index(name) // per_group
        together = sum(NAMES.index(other) // per_group == group for other in names)
        full[:, NAMES.index(name)] = x[:, plane] * (per_group / together if conv.correlation is None else 1)
    expected = [plain(full[n : n + 1]) for n, plain in enumerate(mixed_kernels(conv, x, names))]
    torch.testing.assert_close(conv(x, names), torch.cat(expected))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("names", SETS)
def test_variable_conv_does_not_care_for_the_order_of_channels(geometry: dict, names: tuple[str, ...]) -> None:
    conv = trained(VariableInputConv(6, channels=NAMES, **geometry))
    x = torch.randn(2, len(names), 9, 7, dtype=torch.float64)
    expected = conv(x, channels=names)
    for order in itertools.permutations(range(len(names))):
        out = conv(x[:, list(order)], channels=[names[place] for place in order])
        torch.testing.assert_close(out, expected)


def test_variable_conv_does_not_care_for_the_order_of_unknown_channels() -> None:
    conv = trained(VariableInputConv(6, 3))
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    names = ("G", None, None, "R")
    for order in itertools.permutations(range(4)):
        out = conv(x[:, list(order)], [names[place] for place in order])
        torch.testing.assert_close(out, conv(x, names))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_variable_conv_takes_a_set_a_sample(geometry: dict) -> None:
    """Sets of a batch give what every sample's own set gives, whatever the absent channels hold."""
    conv = trained(VariableInputConv(6, channels=NAMES, **geometry))
    order = ("B", "R", "NIR", "G")
    sets = [names for count in range(1, 5) for names in itertools.combinations(order, count)]
    x = torch.randn(len(sets), 4, 6, 5, dtype=torch.float64)
    present = torch.tensor([[name in names for name in order] for names in sets])
    out = conv(x, order, present)
    for n, names in enumerate(sets):
        torch.testing.assert_close(out[n : n + 1], conv(x[n : n + 1, [order.index(name) for name in names]], names))
    torch.testing.assert_close(conv(torch.where(present[:, :, None, None], x, 1e3), order, present), out)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_variable_conv_channels_of_zeros_add_nothing(geometry: dict) -> None:
    """Given the mix, the scale, and the set that imputation and residual see."""
    conv = trained(VariableInputConv(6, channels=NAMES, **geometry))
    x = torch.randn(2, 2, 9, 7, dtype=torch.float64)
    mix = torch.randn(2, conv.num_kernels, dtype=torch.float64)
    padded = torch.stack((torch.zeros_like(x[:, 0]), x[:, 1], x[:, 0]), dim=1)
    names = ("R", "NIR")
    torch.testing.assert_close(
        conv.convolve(padded, mix, ("G", "NIR", "R"), scale=1.5, context=names), conv.convolve(x, mix, names, scale=1.5)
    )


def test_variable_conv_scales_by_the_channels_present() -> None:
    conv = VariableInputConv(6, 3, channels=NAMES, bias=False, imputation=False).double()
    x, mix = torch.randn(2, 1, 5, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(conv.convolve(x, mix, ("G",)), 4 * conv.convolve(x, mix, ("G",), scale=1.0))
    with torch.no_grad():
        conv.log_gain[0] = math.log(0.5)
    torch.testing.assert_close(conv.convolve(x, mix, ("G",)), 2 * conv.convolve(x, mix, ("G",), scale=1.0))
    # In groups of two channels, every group scales by its own.
    conv = VariableInputConv(6, 3, channels=NAMES, groups=2, imputation=False).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    scaled, plain = (conv.convolve(x, mix, ("R", "G", "B"), scale=scale) for scale in (None, 1.0))
    bias = (mix @ conv.bias)[:, :, None, None]
    torch.testing.assert_close(scaled[:, :3], plain[:, :3])
    torch.testing.assert_close(scaled[:, 3:] - bias[:, 3:], 2 * (plain[:, 3:] - bias[:, 3:]))
    torch.testing.assert_close(conv.convolve(x[:, :1], mix, ("R",))[:, 3:], bias[:, 3:].expand(2, 3, 3, 3))


def test_variable_conv_attention_does_not_depend_on_the_channel_count() -> None:
    conv = VariableInputConv(6, 3).double()
    x = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(conv.mixture(x.expand(2, 3, 5, 5), (None, None, None)), conv.mixture(x))
    torch.testing.assert_close(conv.mixture(x).sum(1), torch.ones(2, dtype=torch.float64))


def test_variable_conv_tells_channels_apart() -> None:
    conv = VariableInputConv(6, 3, temperature=1.0)
    x = torch.randn(2, 1, 5, 5)
    for left, right in itertools.combinations([("R",), ("B",), (None,)], 2):
        assert not torch.allclose(conv(x, left), conv(x, right))
        assert not torch.allclose(conv.mixture(x, left), conv.mixture(x, right))


def test_variable_conv_names_that_are_not_given() -> None:
    conv = trained(VariableInputConv(6, 3))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(conv(x), conv(x, ("R", "G", "B")))
    torch.testing.assert_close(conv(x[:, :2]), conv(x[:, :2], ("R", "G")))
    torch.testing.assert_close(conv(x[:, :1]), conv(x[:, :1], (None,)))
    one = trained(VariableInputConv(6, 3, channels=("R",)))
    torch.testing.assert_close(one(x[:, :1]), one(x[:, :1], ("R",)))


def test_variable_conv_gives_unknown_channels_the_mean_of_the_table() -> None:
    conv = VariableInputConv(6, 3, attention=False, bias=False, imputation=False).double()
    x = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(conv(x), conv(x.expand(2, 3, 5, 5)))


class TestImputation:
    def test_channels_alike_until_correlations_are_known(self) -> None:
        """A grey image is one, whether one channel of it comes, three, or one of unknown identity."""
        conv = VariableInputConv(6, 3, attention=False, bias=False).double()
        x = torch.randn(2, 1, 5, 5, dtype=torch.float64)
        whole, estimated = conv(x.expand(2, 3, 5, 5)), x.expand(2, 3, 5, 5) / 1.01
        torch.testing.assert_close(conv(x), whole / 1.01)
        torch.testing.assert_close(conv(x, ("G",)), conv(torch.cat((x / 1.01, x, x / 1.01), dim=1)))
        pair = torch.cat((x, -x), dim=1)
        torch.testing.assert_close(conv(pair, ("B", "R")), conv(torch.cat((-x, 0 * x, x), dim=1)))
        assert not torch.allclose(conv(x, ("G",)), conv(estimated))

    def test_is_least_squares_on_noisy_channels(self) -> None:
        """The shares are those of a regression on samples."""
        generator = torch.Generator().manual_seed(0)
        count = 200_000
        planes = torch.randn(4, 4, generator=generator).double() @ torch.randn(4, count, generator=generator).double()
        planes = (planes - planes.mean(1, keepdim=True)) / planes.std(1, keepdim=True)
        sets = torch.tensor([[True, False, True], [True, True, True], [False, True, False]])
        places = [3, 1, 0]
        shares = imputation_shares(planes.corrcoef(), sets, places)
        assert shares.shape == (3, 4, 3)
        for chosen, made in zip(sets, shares, strict=True):
            there = [place for place, drawn in zip(places, chosen, strict=True) if drawn]
            seen = planes[there] + 0.1 * torch.randn(len(there), count, generator=generator)
            for wanted in range(4):
                found = made[wanted, chosen]
                if wanted in there:
                    assert (found == 0).all()
                    continue
                expected = torch.linalg.lstsq(seen.t(), planes[wanted, :, None]).solution.flatten()
                torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
            assert (made[:, ~chosen] == 0).all()

    def test_unknown_channels_are_known_ones_drawn_at_random(self) -> None:
        correlation = torch.randn(3, 9, dtype=torch.float64).corrcoef()
        shares = imputation_shares(correlation, torch.ones(1, 2, dtype=torch.bool), [3, 3])[0]
        likeness = correlation.mean(0)
        expected = likeness / (1.01 + correlation.mean())
        torch.testing.assert_close(shares, expected[:, None].expand(3, 2))

    def test_unknown_channels_beside_all_known_ones_add_what_the_residual_makes_of_them(self) -> None:
        conv = trained(VariableInputConv(6, 3, residual=False))
        x, mix = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
        names = ("R", "G", "B", None)
        torch.testing.assert_close(conv.convolve(x, mix, names), conv.convolve(x[:, :3], mix))
        conv = trained(VariableInputConv(6, 3))
        assert not torch.allclose(conv.convolve(x, mix, names), conv.convolve(0 * x + x[:, :1], mix, names))

    def test_near_duplicates_share(self) -> None:
        """Coefficients stay small where channels are hard to tell apart."""
        correlation = torch.ones(3, 3).fill_diagonal_(1)
        shares = imputation_shares(correlation, torch.ones(1, 2, dtype=torch.bool), [0, 1])
        torch.testing.assert_close(shares[0], torch.tensor([[0.0, 0.0], [0.0, 0.0], [1 / 2.01, 1 / 2.01]]))

    def test_groups_keep_to_themselves(self) -> None:
        conv = VariableInputConv(4, 1, groups=2, channels=NAMES, bias=False, attention=False).double()
        x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
        out = conv(x, ("R",))
        torch.testing.assert_close(out[:, :2], conv(torch.cat((x, x / 1.01, x, x), dim=1))[:, :2])
        assert (out[:, 2:] == 0).all()

    @pytest.mark.parametrize(
        "correlation",
        [
            torch.ones(2, 2),
            torch.zeros(3, 3),
            torch.eye(3) + torch.tensor([[0, 0.5, 0], [0, 0, 0], [0, 0, 0]]),
            torch.tensor([[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]]),
            torch.full((3, 3), math.nan),
        ],
    )
    def test_explains_what_is_no_correlation(self, correlation: torch.Tensor) -> None:
        conv = VariableInputConv(4, 3)
        with pytest.raises(ValueError, match=r"correlation: got \(.*expected a symmetric matrix \(3, 3\)"):
            conv.set_correlation(correlation)
        assert torch.equal(conv.correlation, torch.ones(3, 3))

    def test_explains_that_there_is_none(self) -> None:
        with pytest.raises(ValueError, match="correlation: got one, expected none"):
            VariableInputConv(4, 3, imputation=False).set_correlation(torch.eye(3))


def test_variable_conv_one_code_path_for_1_to_64_channels() -> None:
    names = tuple(f"band {number}" for number in range(64))
    conv = trained(VariableInputConv(3, 3, padding=1, channels=names))
    x = torch.randn(2, 64, 4, 4, dtype=torch.float64)
    for count in (*range(1, 65, 9), 64):
        chosen = torch.randperm(64)[:count].tolist()
        out = conv(x[:, chosen], [names[place] for place in chosen])
        present = torch.zeros(2, 64, dtype=torch.bool)
        present[:, chosen] = True
        torch.testing.assert_close(conv(x, names, present), out)
    # Known and unknown ones together, more than the table has.
    few = trained(VariableInputConv(3, 3, padding=1))
    for count in (1, 5, 61):
        assert few(x[:, : count + 3], ("R", "G", "B", *[None] * count)).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 4), (33, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_variable_conv_sizes(size: tuple[int, int], stride: int, dilation: int) -> None:
    plain = nn.Conv2d(3, 4, 3, stride, padding=2, dilation=dilation)
    conv = VariableInputConv.from_conv2d(plain)
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(conv(x), plain(x), atol=1e-5, rtol=1e-5)
    assert conv(x[:, 1:], ("G", "B")).shape == plain(x).shape


def test_variable_conv_trains_at_batch_one_on_any_channels() -> None:
    conv = VariableInputConv(4, 3, padding=1, temperature=1.0)
    before = {key: value.clone() for key, value in conv.named_parameters()}
    optimiser = torch.optim.SGD(conv.parameters(), lr=0.1)
    held = [id(each) for group in optimiser.param_groups for each in group["params"]]
    for names in ("R", "GB", "RGB", (None,), ("B", None)) * 2:
        optimiser.zero_grad()
        conv(torch.randn(1, len(names), 6, 6), channels=tuple(names)).square().mean().backward()
        optimiser.step()
    assert [id(each) for each in conv.parameters()] == held, "what is trained must exist from construction on"
    assert set(conv.state_dict()) == {*before, "temperature", "correlation"}
    for key, value in conv.named_parameters():
        assert torch.isfinite(value).all()
        assert not torch.equal(value, before[key]), key


def test_variable_conv_gradients() -> None:
    grouped = VariableInputConv(2, (1, 2), groups=2, channels=NAMES, num_kernels=2)
    for conv in (grouped, VariableInputConv(1, 2, num_kernels=2, temperature=2.0)):
        trained(conv)
        names, unknown = conv.channels[-2:], None if conv.groups == 1 else "R"
        present = torch.tensor([[True, False, True], [True, True, False]])
        x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
        inputs = (x, *conv.parameters())
        torch.autograd.gradcheck(lambda x, *_, conv=conv, names=names: conv(x[:, :2], names), inputs)
        torch.autograd.gradcheck(
            lambda x, *_, conv=conv, names=(*names, unknown), present=present: conv(x, names, present), inputs
        )


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 6, (1, 2), stride=2, padding=(0, 1), groups=3, bias=False),
        nn.Conv2d(3, 4, 3, dilation=2, dtype=torch.float64),
    ],
)
def test_variable_conv_from_and_to_conv2d(conv: nn.Conv2d) -> None:
    x = torch.randn(2, 3, 8, 9, dtype=conv.weight.dtype)
    variable = VariableInputConv.from_conv2d(conv, num_kernels=4)
    torch.testing.assert_close(variable(x), conv(x), atol=1e-5, rtol=1e-5)
    back = variable.to_conv2d()
    # A quarter of four copies each: to the last bit.
    assert all(torch.equal(back.state_dict()[key], value) for key, value in conv.state_dict().items())
    assert torch.equal(back(x), conv(x))


def test_variable_conv_to_conv2d_of_some_channels_and_a_mixture() -> None:
    conv = trained(VariableInputConv(6, 3, padding=1, num_kernels=2))
    x, mix = torch.randn(2, 2, 5, 5, dtype=torch.float64), [0.3, 0.9]
    for names in (("B", "R"), ("G", None)):
        plain = conv.to_conv2d(names, mix)
        assert plain.in_channels == 2
        torch.testing.assert_close(plain(x), conv.convolve(x, torch.tensor([mix, mix]).double(), names))


def test_variable_conv_temperature_is_a_buffer_with_a_schedule() -> None:
    conv = VariableInputConv(4, 3, temperature=12.0)
    assert conv.state_dict()["temperature"] == 12
    taken = []
    for progress in (0, 0.25, 0.5, 0.7, 1):
        conv.anneal(progress, until=0.5)
        taken.append(float(conv.temperature))
    assert taken == [12.0, 6.5, 1.0, 1.0, 1.0]
    other = VariableInputConv(4, 3)
    other.load_state_dict(conv.state_dict())
    assert float(other.temperature) == 1.0
    with pytest.raises(ValueError, match="progress: got -1, expected 0 <= progress <= 1"):
        conv.anneal(-1)
    with pytest.raises(ValueError, match="until: got 0, expected 0 < until <= 1"):
        conv.anneal(1, until=0)


def test_variable_conv_under_autocast() -> None:
    conv = trained(VariableInputConv(4, 3, padding=1)).float()
    x, present = torch.randn(2, 3, 8, 8), torch.tensor([[True, True, False], [False, True, True]])
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x, ("R", "B", None), present)
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), conv(x, ("R", "B", None), present), atol=0.05, rtol=0.05)
    assert all(each.grad.dtype == torch.float32 for each in conv.parameters())


@pytest.mark.parametrize(
    ("count", "channels", "text"),
    [
        (4, None, "channels: got None for an x of 4 channels"),
        (2, ("R", "g"), "channels: got 'g', expected names out of"),
        (2, ("R", "R"), r"channels: got \('R', 'R'\), expected 2 names"),
        (2, ("R", "G", "B"), "expected 2 names, one for each channel of x, each once"),
        (0, (), r"x: got shape \(1, 0, 5, 5\), expected"),
    ],
)
def test_variable_conv_explains_wrong_channels(count: int, channels: tuple[str, ...] | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        VariableInputConv(4, 3)(torch.zeros(1, count, 5, 5), channels=channels)


def test_variable_conv_explains_wrong_sets() -> None:
    conv, x = VariableInputConv(4, 3), torch.zeros(2, 3, 5, 5)
    for present in (torch.ones(2, 3), torch.ones(3, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"present: got torch.* expected torch.bool of shape .* = \(2, 3\)"):
            conv(x, present=present)
    with pytest.raises(ValueError, match="for which a convolution with groups has no place"):
        VariableInputConv(3, 3, groups=3)(x, ("R", "G", None))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"channels": ("R", "R")}, "channels: got"),
        ({"channels": ()}, "channels: got"),
        ({"groups": 2}, r"groups: got 2, expected a divisor of len\(channels\) = 3 and out_channels = 4"),
        ({"num_kernels": 0}, "num_kernels: got 0"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected a finite number > 0"),
        ({"stride": 0}, "stride: got 0, expected an integer >= 1"),
        ({"padding": (1, -1)}, r"padding: got \(1, -1\), expected an integer >= 0"),
    ],
)
def test_variable_conv_explains_wrong_arguments(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        VariableInputConv(4, 3, **arguments)


def test_variable_conv_explains_what_it_cannot_convert() -> None:
    with pytest.raises(ValueError, match="channels: got .*expected conv.in_channels = 2 names"):
        VariableInputConv.from_conv2d(nn.Conv2d(2, 4, 3))
    with pytest.raises(ValueError, match="conv: got padding_mode='reflect'"):
        VariableInputConv.from_conv2d(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="mix: got 3 weights, expected num_kernels = 4"):
        VariableInputConv(4, 3).to_conv2d(mix=[1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="with groups a convolution needs them all"):
        VariableInputConv(3, 3, groups=3).to_conv2d(("R",))


@pytest.mark.parametrize("name", ["static_resnet18", "variable_resnet18"])
def test_variable_networks_take_every_set_of_channels(name: str) -> None:
    network = create_model(name, num_classes=3).double().eval()
    x = torch.randn(7, 3, 16, 16, dtype=torch.float64)
    sets = [names for count in (1, 2, 3) for names in itertools.combinations("RGB", count)]
    with torch.no_grad():
        alone = [network(x[n : n + 1, ["RGB".index(each) for each in names]], names) for n, names in enumerate(sets)]
        present = torch.tensor([[each in names for each in "RGB"] for names in sets])
        torch.testing.assert_close(network(x, ("R", "G", "B"), present), torch.cat(alone))
        torch.testing.assert_close(network(x[:, [2, 0]], ("B", "R")), network(x[:, [0, 2]], ("R", "B")))
    assert network.takes_unknown == (name == "variable_resnet18")


def test_variable_resnet18_keeps_its_budget() -> None:
    """At most 1 % more parameters and 3 % more operations than plain ResNet-18, over three channels."""
    ours, plain = create_model("variable_resnet18"), create_model("resnet18")
    assert count_parameters(ours) <= 1.01 * count_parameters(plain)
    assert count_flops(ours, (1, 3, 64, 64)) <= 1.03 * count_flops(plain, (1, 3, 64, 64))


# Counting


def test_flops_of_a_convolution() -> None:
    assert count_flops(nn.Conv2d(3, 8, (3, 2), stride=2), (5, 3, 9, 9)) == 2 * 5 * 8 * 4 * 4 * 3 * 3 * 2


def test_flops_of_deform_conv2d() -> None:
    # N 2, C 4 in 2 groups, O 6, 3x2 taps, output 5x4, one offset group.
    x, weight = torch.randn(2, 4, 7, 5), torch.randn(6, 2, 3, 2, requires_grad=True)
    offset, mask = torch.zeros(2, 2 * 6, 5, 4), torch.ones(2, 6, 5, 4)
    product = 2 * 2 * 6 * 2 * 6 * 20
    samples = 2 * 4 * 6 * 20
    op = torch.ops.dynconv_ext.deform_conv2d
    for given, per_sample in ((None, 8), (mask, 9)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            op(x, offset, weight, None, [1, 1], [0, 0], [1, 1], given)
        assert counter.get_total_flops() == product + per_sample * samples


def test_flops_of_deform_conv2d_backward() -> None:
    arguments = {
        "input": torch.randn(2, 4, 7, 5),
        "offset": torch.zeros(2, 2 * 6, 5, 4),
        "weight": torch.randn(6, 2, 3, 2),
        "mask": torch.ones(2, 6, 5, 4),
    }
    product, samples = 2 * 2 * 6 * 2 * 6 * 20, 2 * 4 * 6 * 20
    expected = {
        ("input",): product + 9 * samples,
        ("weight",): product + 9 * samples,
        ("input", "offset", "weight", "mask"): 2 * product + (9 + 17 + 9 + 8) * samples,
    }
    for needed, flops in expected.items():
        given = {key: value.clone().requires_grad_(key in needed) for key, value in arguments.items()}
        out = torch.ops.dynconv_ext.deform_conv2d(
            given["input"], given["offset"], given["weight"], None, [1, 1], [0, 0], [1, 1], given["mask"]
        )
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == flops, needed


def _flops_of_dynamic(needed: tuple[str, ...], bias: bool, operator: str) -> tuple[int, int]:
    """Operations of the forward and of the backward pass: N 2, C 4 in 2 groups, O 6, K 3, 3x2 taps, output 5x4."""
    tensors = {"input": torch.randn(2, 4, 7, 5), "weight": torch.randn(3, 6, 2, 3, 2), "attention": torch.randn(2, 3)}
    if bias:
        tensors["bias"] = torch.randn(3, 6)
    for name in needed:
        tensors[name].requires_grad_()
    x, weight, attention, biases = (tensors.get(name) for name in ("input", "weight", "attention", "bias"))
    with FlopCounterMode(display=False) as counter:
        if operator == "dynamic_conv2d":
            out = dynconv_ext.dynamic_conv2d(x, weight, attention, biases, groups=2, temperature=2.0).sum()
        else:
            kernels, mixed = dynconv_ext.aggregate_kernels(weight, attention, biases)
            out = kernels.sum() if mixed is None else kernels.sum() + mixed.sum()
        forward = counter.get_total_flops()
        if needed:
            out.backward()
    return forward, counter.get_total_flops() - forward


def test_flops_of_dynamic_conv2d() -> None:
    product, mix, mix_bias = 2 * 2 * 6 * 2 * 6 * 20, 2 * 2 * 3 * (6 * 2 * 6), 2 * 2 * 3 * 6
    everything = ("input", "weight", "attention")
    assert _flops_of_dynamic((), False, "dynamic_conv2d") == (product + mix, 0)
    assert _flops_of_dynamic(("input",), True, "dynamic_conv2d") == (product + mix + mix_bias, product + mix)
    assert _flops_of_dynamic(("weight",), False, "dynamic_conv2d")[1] == product + mix
    assert _flops_of_dynamic(("attention",), True, "dynamic_conv2d")[1] == product + mix + mix_bias
    assert _flops_of_dynamic(everything, False, "dynamic_conv2d")[1] == 2 * product + 3 * mix
    assert _flops_of_dynamic((*everything, "bias"), True, "dynamic_conv2d")[1] == 2 * product + 3 * mix + 2 * mix_bias


def test_flops_of_aggregate_kernels() -> None:
    mix, mix_bias = 2 * 2 * 3 * (6 * 2 * 6), 2 * 2 * 3 * 6
    assert _flops_of_dynamic((), False, "aggregate_kernels") == (mix, 0)
    assert _flops_of_dynamic(("weight",), True, "aggregate_kernels") == (mix + mix_bias, mix)
    assert _flops_of_dynamic(("attention", "bias"), True, "aggregate_kernels")[1] == mix + 2 * mix_bias


# The notebook's profiler gave 232,821,760 at 128x128: it counts norms and poolings, and not the deformable product.
TASK2_AT_128 = {
    "layer1": 2 * (3 * 25) * 64 * 64**2,
    "attention1": 2 * (64 * 8 + 8 * 64) * 64**2,
    "layer2": 2 * (64 * 9) * 64 * 32**2,
    "layer3": 2 * (64 * 9) * 64 * 32**2,
    "offset and modulator": 2 * (64 * 9) * 27 * 32**2,
    "cbam": 2 * 2 * (128 * 64 + 64 * 128) + 2 * (2 * 49) * 32**2,
    "fc1": 2 * 128 * 50,
}


def test_flops_of_task2_published() -> None:
    network = create_model("task2_published", image_size=128)
    without_deformable = sum(TASK2_AT_128.values())
    assert without_deformable == pytest.approx(232_821_760, rel=0.01)
    deformable = 2 * (64 * 9) * 128 * 32**2 + 9 * (64 * 9) * 32**2
    assert count_flops(network) == without_deformable + deformable


@pytest.mark.parametrize("name", ["task1_published", "variable_resnet18"])
def test_flops_of_the_task1_stems(name: str) -> None:
    """Those of ResNet-18, the mixture of four kernels (and a residual), the attention, the residual's network."""
    mixture = 2 * (5 if name == "variable_resnet18" else 4) * 64 * 3 * 3 * 3
    residual = 3 * 8 + 3 * (17 * 32 + 32 * 576)
    attention = {
        "task1_published": 2 * (3 * 3 + 3 * 4),
        "variable_resnet18": 2 * (3 * 10 * 16 + 16 * 4 + residual),
    }[name]
    shape = (1, 3, 32, 32)
    assert count_flops(create_model(name), shape) == count_flops(create_model("resnet18"), shape) + mixture + attention


@pytest.mark.parametrize(("size", "gigaflops"), [(124, 2.36), (64, 0.598)])
def test_flops_of_resnet34(size: int, gigaflops: float) -> None:
    assert count_flops(create_model("resnet34"), (1, 3, size, size)) / 1e9 == pytest.approx(gigaflops, abs=0.0005)


def test_count_flops_leaves_the_network_and_the_random_state_alone() -> None:
    network = create_model("task1_published", num_classes=2)
    network.layer1.eval()
    state, random_state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    modes = [module.training for module in network.modules()]
    count_flops(network, (1, 3, 16, 16))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in network.modules()] == modes
    assert network.conv1._attention is None
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in state.items())


def test_count_flops_wants_a_shape() -> None:
    with pytest.raises(ValueError, match="input_shape: got None"):
        count_flops(nn.Conv2d(3, 3, 3))
