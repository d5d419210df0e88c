# SPDX-License-Identifier: BSD-3-Clause
"""The one preprocessing pipeline: a uint8 BGR image of any size in, uint8 RGB (3, S, S) out.

The steps and their parameters are those of the source report: INTER_AREA resize, single-image non-local means on the
colour image (h 3, template 7, search 21), min-max normalisation over the whole image. All of them run on BGR as cv2
loads it; the last step alone turns BGR into RGB, so red is channel 0 for everything that comes after.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

PIPELINE_VERSION = 1
"""Part of the cache key: raise it whenever the pixels that `preprocess` returns change."""

# How a whole file of each format ends. cv2 is content with a JPEG that stops half-way (in most versions it fills the
# rest with grey and says nothing), so a file that ends otherwise is read by Pillow too, which refuses truncated files.
_ENDINGS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82"}


class UnreadableImageError(Exception):
    """A file that can't be read as an image; the text says why."""


@dataclass(frozen=True, slots=True)
class PreprocessConfig:
    """What is done to every image.

    Attributes:
        image_size: height and width in pixels of the result.
        denoise: non-local means, about 50 ms an image of 124x124 on one core.
        normalize: stretch the values of each image to 0..255, over its three channels together.
    """

    image_size: int
    denoise: bool = False
    normalize: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.image_size, bool) or not isinstance(self.image_size, int) or self.image_size < 1:
            raise ValueError(f"image_size: got {self.image_size!r}, expected a number of pixels, 1 or more")

    @property
    def tag(self) -> str:
        """A readable name for a folder: ``124px-denoise-normalize-v1``."""
        steps = [f"{self.image_size}px", *(name for name in ("denoise", "normalize") if getattr(self, name))]
        return "-".join([*steps, f"v{PIPELINE_VERSION}"])


def read_bgr(path: str | Path) -> NDArray[np.uint8]:
    """The image in a file as uint8 BGR (H, W, 3), the pixels of ``cv2.imread``.

    Greyscale becomes three equal channels, transparency is dropped, EXIF orientation is applied.

    Args:
        path: an image file of any format that OpenCV reads.

    Returns:
        uint8 BGR (H, W, 3).

    Raises:
        UnreadableImageError: the file can't be opened, is no image, or stops half-way.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from None
    if not data:
        raise UnreadableImageError("the file is empty")
    for start, end in _ENDINGS.items():
        if data.startswith(start) and not data.endswith(end):
            _refuse_truncated(data)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise UnreadableImageError(f"OpenCV: {error.err}") from None
    if image is None:
        raise UnreadableImageError(f"{len(data)} bytes that are no image or a broken one")
    return image


def _refuse_truncated(data: bytes) -> None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    # Pillow reports broken files by many types (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        raise UnreadableImageError(str(error)) from None


def preprocess(image: NDArray[np.uint8], config: PreprocessConfig) -> NDArray[np.uint8]:
    """Run the pipeline on one image.

    Args:
        image: uint8 BGR (H, W, 3).
        config: size and steps.

    Returns:
        uint8 RGB (3, image_size, image_size), contiguous.
    """
    size = (config.image_size, config.image_size)
    if image.shape[:2] != size:
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if config.denoise:
        image = cv2.fastNlMeansDenoising(image, None, h=3, templateWindowSize=7, searchWindowSize=21)
    if config.normalize:
        image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    return np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))
