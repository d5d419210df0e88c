# SPDX-License-Identifier: BSD-3-Clause
"""Statistics and a norm of maps that leave channels-last ones channels last, and their gradients too.

What they replace gives the same numbers, but in the other memory format, and adding gradients of two formats takes many
times as long as adding equal ones.

Source: ours; the definitions are those of `torch.mean`, `torch.nn.AdaptiveMaxPool2d` and `torch.nn.LayerNorm`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pixel_means(x: Tensor) -> Tensor:
    """Means over the pixels of ``x`` (N, C, H, W): (N, C)."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).mean((1, 2))
    return x.mean((2, 3))


def pixel_maxima(x: Tensor) -> Tensor:
    """Maxima over the pixels of ``x`` (N, C, H, W): (N, C). Of equal ones, one gets the gradient."""
    # Not amax, whose gradient counts the equal ones in int64.
    return F.adaptive_max_pool2d(x, 1).flatten(1)


class MapNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over whole maps (C, H, W) that leaves channels-last ones channels last.

    ``nn.LayerNorm`` copies them, and what follows copies them back. Its parameters and results are those of this one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each image.

        Args:
            x: (N, C, H, W), of the size (C, H, W) that the layer was made for.

        Returns:
            The same shape and memory format.

        Raises:
            ValueError: If the size is another.
        """
        channels, height, width = self.normalized_shape
        if x.shape[1:] != self.normalized_shape:
            raise ValueError(
                f"x: got maps of shape {tuple(x.shape)}, expected (N, {channels}, {height}, {width}); norms over whole "
                f"maps fix the size of the images: build the network with the image_size of the data"
            )
        if not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        weight, bias = (parameter.permute(1, 2, 0) for parameter in (self.weight, self.bias))
        normal = F.layer_norm(x.permute(0, 2, 3, 1), (height, width, channels), weight, bias, self.eps)
        return normal.permute(0, 3, 1, 2)
