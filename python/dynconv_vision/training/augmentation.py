# SPDX-License-Identifier: BSD-3-Clause
"""Augmentation of whole batches on their device, drawn for every image by itself.

torchvision's transforms draw once for all images that they are given: an image at a time, on the host, they take longer
than a GPU takes to train a small network on it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Of "strong": area and width over height of a crop; of an erased box; and how often there is one.
_CROP_AREA, _CROP_RATIO = (0.35, 1.0), (3 / 4, 4 / 3)
_ERASED_AREA, _ERASED_RATIO, _ERASED_SHARE = (0.02, 0.33), (0.3, 3.3), 0.25
#: Brightness, contrast and saturation are multiplied by 1 -+ this.
_JITTER = 0.3
_GREY = 114 / 255
_LUMINANCE = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as in torchvision
_DRAWS = 12


def augment(name: str, images: Tensor, seed: int) -> Tensor:
    """Augment images as `TrainConfig.augment` names it.

    "light": flips, and shifts by up to an eighth of the size over reflected borders. "strong": flips, crops of 35 to
    100 percent of the area, brightness, contrast and saturation, and a grey box on every fourth image.

    Args:
        name: "none", "light" or "strong".
        images: (N, 3, H, W), floating point, in [0, 1].
        seed: Decides everything that is drawn, on every device.

    Returns:
        (N, 3, H, W), as `images` in memory; `images` itself for "none".
    """
    if name == "none":
        return images
    # On the host, so that all devices draw the same; a row an image, so that its neighbours do not matter.
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(images), _DRAWS, generator=generator).to(images.device, non_blocking=True)
    flip, place, shape = draws[:, 0] < 0.5, draws[:, 1:3], draws[:, 3:5]
    if name == "light":
        out = _shifted(images, place, flip)
    else:
        out = _cropped(images, _boxes(shape, place, _CROP_AREA, _CROP_RATIO), flip)
        out = _coloured(out, 1 + _JITTER * (2 * draws[:, 5:8] - 1))
        boxes = _boxes(draws[:, 8:10], draws[:, 10:12], _ERASED_AREA, _ERASED_RATIO)
        # The flip's draw within its half is an even draw again.
        out = _with_box(out, boxes, (2 * draws[:, 0]) % 1 < _ERASED_SHARE)
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    return out.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _boxes(shape: Tensor, place: Tensor, area: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """(N, 4) top, left, height, width in shares of the image, from (N, 2) draws in [0, 1) of shape and of place.

    The area is uniform, the ratio of width and height log-uniform; a side longer than the image is cut.
    """
    share = area[0] + (area[1] - area[0]) * shape[:, 0]
    low, high = map(math.log, ratio)
    aspect = torch.exp(low + (high - low) * shape[:, 1])
    size = torch.stack(((share / aspect).sqrt(), (share * aspect).sqrt()), 1).clamp_max(1)
    return torch.cat((place * (1 - size), size), 1)


def _sampled(images: Tensor, boxes: Tensor, flip: Tensor, padding_mode: str) -> Tensor:
    """Bilinear samples of boxes (N, 4), top, left, height, width in shares, at the images' own size."""
    top, left, height, width = boxes.unbind(1)
    zero = torch.zeros_like(top)
    # affine_grid's coordinates go from -1 to 1, from edge to edge.
    across = torch.stack((torch.where(flip, -width, width), zero, 2 * left + width - 1), 1)
    down = torch.stack((zero, height, 2 * top + height - 1), 1)
    grid = F.affine_grid(torch.stack((across, down), 1).to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding_mode, align_corners=False)


def _cropped(images: Tensor, boxes: Tensor, flip: Tensor) -> Tensor:
    # Crops are made larger, never smaller: nothing to smooth before.
    return _sampled(images, boxes, flip, "border")


def _shifted(images: Tensor, place: Tensor, flip: Tensor) -> Tensor:
    sizes = torch.tensor(images.shape[2:], device=images.device)
    reach = (sizes // 8).clamp_min(1)
    steps = torch.floor(place * (2 * reach + 1)) - reach
    return _sampled(images, torch.cat((steps / sizes, torch.ones_like(place)), 1), flip, "reflection")


def _coloured(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation times (N, 3) factors, as torchvision defines each."""
    brightness, contrast, saturation = factors.to(images.dtype)[:, :, None, None, None].unbind(1)
    weights = torch.tensor(_LUMINANCE, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    out = (images * brightness).clamp_(0, 1)
    mean = (out * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    out = torch.lerp(mean, out, contrast).clamp_(0, 1)
    return torch.lerp((out * weights).sum(1, keepdim=True), out, saturation).clamp_(0, 1)


def _with_box(images: Tensor, boxes: Tensor, erased: Tensor) -> Tensor:
    """Images with a grey box where `erased`."""
    inside = []
    for size, start, length in zip(images.shape[2:], boxes.T[:2], boxes.T[2:], strict=True):
        centres = (torch.arange(size, device=images.device) + 0.5) / size
        inside.append((centres >= start[:, None]) & (centres < (start + length)[:, None]))
    box = inside[0][:, :, None] & inside[1][:, None, :] & erased[:, None, None]
    return images.masked_fill(box[:, None], _GREY)
