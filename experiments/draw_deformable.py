# SPDX-License-Identifier: BSD-3-Clause
"""Draw what the deformable layers of a network of Task II have learned, on images of a list file.

    python experiments/draw_deformable.py --checkpoint FILE --data FOLDER --list test.txt --output FOLDER
    python experiments/draw_deformable.py ... --pictures FILE FILE    # draws these; the list is for offsets.csv alone

Writes samples.png (where two output pixels of each layer sample the image), maps.png (modulation, length of offsets,
and Grad-CAM of the predicted class) and offsets.csv (what share of all offsets is how long, over the whole list).
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dynconv_ext import DeformableConv2d
from dynconv_vision.data import PreprocessConfig, load_list, preprocess, read_bgr
from dynconv_vision.data.preprocessing import UnreadableImageError
from dynconv_vision.reporting.deformable import Samples, draw_maps, draw_samples
from dynconv_vision.training import EvaluationLoader, ModelCard, StudyError, load_network, prepare_images

#: Bounds of the histogram of offsets, in pixels of the layer's input.
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


class Recorder:
    """Keeps the inputs of deformable layers and the output of the network's last map, for one call."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = {name: each for name, each in model.named_modules() if isinstance(each, DeformableConv2d)}
        self.inputs: dict[str, Tensor] = {}
        self.last: Tensor | None = None
        for name, layer in self.layers.items():
            layer.register_forward_hook(lambda _, args, out, name=name: self.inputs.update({name: args[0]}))
        for layer in model.modules():
            if not list(layer.children()) or isinstance(layer, DeformableConv2d):
                layer.register_forward_hook(self._keep_map)

    def _keep_map(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        # The last map of more than one pixel that has a gradient is what the classifier's pooling sees.
        if isinstance(out, Tensor) and out.dim() == 4 and min(out.shape[2:]) > 1 and out.shape[1] > 2:
            self.last = out


def class_activation(logits: Tensor, activations: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Grad-CAM of the predicted classes, (n, H, W), each image's greatest value being 1; and the classes.

    Source: Selvaraju et al., Grad-CAM, ICCV 2017, arXiv:1610.02391, equations 1 and 2.
    """
    classes = logits.argmax(1)
    (grad,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), activations)
    maps = (grad.mean((2, 3), keepdim=True) * activations).sum(1).relu()
    maps = maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return maps.detach().numpy(), classes.numpy()


def predictions(layer: DeformableConv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets (n, D, K, 2, H, W), y then x, and modulation (n, D, K, H, W)."""
    offset, mask = layer.predict(x)
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    offset = offset.unflatten(1, (layer.offset_groups, taps, 2))
    mask = torch.ones_like(offset[:, :, :, 0]) if mask is None else mask.unflatten(1, (layer.offset_groups, taps))
    return offset, mask


def sampled(layer: DeformableConv2d, offset: Tensor, mask: Tensor, image: int, out: tuple[int, int]) -> Samples:
    """Where an output pixel of the first offset group samples, in pixels of the layer's input."""
    steps = [torch.arange(size) * dilation for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
    grid = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1).flatten(0, 1).float()
    corner = torch.tensor([place * s - p for place, s, p in zip(out, layer.stride, layer.padding, strict=True)])
    regular = grid + corner
    moved = regular + offset[image, 0, :, :, out[0], out[1]]
    return Samples(regular.mean(0).numpy(), moved.numpy(), mask[image, 0, :, out[0], out[1]].numpy())


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(description="Pictures of a network's deformable layers.")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="best.ckpt, or safetensors")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where the list's paths start")
    parser.add_argument("--list", type=Path, required=True, metavar="FILE", help="list file, relative to --data")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--images", type=int, default=6, metavar="N", help="how many to draw, evenly over the list")
    parser.add_argument("--pictures", type=Path, nargs="+", metavar="FILE", help="image files to draw instead")
    options = parser.parse_args(argv)
    try:
        if options.images < 1:
            raise StudyError(f"--images: got {options.images}, expected at least 1")
        model, card = load_network(options.checkpoint)
        model.eval()
        recorder = Recorder(model)
        if not recorder.layers:
            raise StudyError(f"--checkpoint: {card.model!r} has no DeformableConv2d")
        file = options.data / options.list
        split = load_list(file, root=options.data, num_classes=card.num_classes, **card.preprocessing)
        truth: list[str | None]
        if options.pictures is None:
            chosen = np.unique(np.linspace(0, len(split) - 1, options.images).round().astype(np.int64))
            images, truth = split.images[chosen], [card.classes[label] for label in split.labels[chosen]]
        else:
            images = np.stack([_read(path, PreprocessConfig(**card.preprocessing)) for path in options.pictures])
            truth = [None] * len(images)
        options.output.mkdir(parents=True, exist_ok=True)
        _draw(model, recorder, np.ascontiguousarray(images), truth, card, options.output)
        _write_lengths(model, recorder, split, options.output / "offsets.csv")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: samples.png, maps.png, offsets.csv")
    return 0


def _read(path: Path, steps: PreprocessConfig) -> np.ndarray:
    try:
        return preprocess(read_bgr(path), steps)
    except UnreadableImageError as error:
        raise StudyError(f"--pictures: {path}: {error}") from None


def _draw(
    model: nn.Module,
    recorder: Recorder,
    images: np.ndarray,
    truth: Sequence[str | None],
    card: ModelCard,
    folder: Path,
) -> None:
    size = images.shape[2]
    logits = model(prepare_images(torch.from_numpy(images)))
    cams, classes = class_activation(logits, recorder.last)
    pictures = images.transpose(0, 2, 3, 1)
    samples, maps = {}, {}
    with torch.no_grad():
        for name, layer in recorder.layers.items():
            x = recorder.inputs[name]
            offset, mask = predictions(layer, x)
            height, width = offset.shape[-2:]
            pixels = [(height // 3, width // 3), (2 * height // 3, 2 * width // 3)]
            samples[name] = [
                [sampled(layer, offset, mask, image, pixel).in_image(x.shape[2], size) for pixel in pixels]
                for image in range(len(images))
            ]
            if layer.modulator_conv is not None:
                maps[f"{name}\nmodulation"] = mask.mean((1, 2)).numpy()
            maps[f"{name}\noffset, pixels"] = offset.norm(dim=3).mean((1, 2)).numpy()
    maps["Grad-CAM"] = cams
    told = [card.classes[place] for place in classes]
    names = [one if other in (None, one) else f"{other}\n(told: {one})" for one, other in zip(told, truth, strict=True)]
    title = f"{card.model}: sampling points of two output pixels a layer"
    draw_samples(folder / "samples.png", pictures, samples, title)
    draw_maps(folder / "maps.png", pictures, maps, names, f"{card.model}: means over taps, and Grad-CAM")


@torch.no_grad()
def _write_lengths(model: nn.Module, recorder: Recorder, split: object, path: Path) -> None:
    """Shares of offset lengths, and mean and deviation of the modulation, of every layer over all images."""
    counts = {name: np.zeros(len(LENGTHS) + 1) for name in recorder.layers}
    sums = {name: np.zeros(3) for name in recorder.layers}
    for batch in EvaluationLoader(split):
        model(prepare_images(batch.images))
        for name, layer in recorder.layers.items():
            offset, mask = predictions(layer, recorder.inputs[name])
            length = offset.norm(dim=3).flatten().numpy()
            counts[name] += np.bincount(np.searchsorted(LENGTHS, length), minlength=len(LENGTHS) + 1)
            values = mask.double()
            sums[name] += [values.numel(), float(values.sum()), float(values.square().sum())]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        bounds = [f"<={bound:g}" for bound in LENGTHS] + [f">{LENGTHS[-1]:g}"]
        writer.writerow(["layer", *(f"share of offsets {bound} px" for bound in bounds), "mask mean", "mask sd"])
        for name, row in counts.items():
            number, total, squares = sums[name]
            mean = total / number
            deviation = max(0.0, squares / number - mean**2) ** 0.5
            writer.writerow([name, *(f"{share:.4f}" for share in row / row.sum()), f"{mean:.4f}", f"{deviation:.4f}"])


if __name__ == "__main__":
    sys.exit(main())
