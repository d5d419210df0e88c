# SPDX-License-Identifier: BSD-3-Clause
"""Datasets for the studies: found, checked, preprocessed once and then mapped into memory.

>>> from dynconv_vision.data import load_dataset
>>> data = load_dataset("generated", image_size=32, limits={"train": 100, "val": 50, "test": 50}, progress=False)
>>> data.train.images.shape, data.train.labels.dtype, len(data.classes)
((100, 3, 32, 32), dtype('int64'), 50)
"""

from .cache import default_cache_dir
from .dataset import ImageDataset, ImageSplit, load_dataset, load_list
from .derived import CHANNEL_NAMES, channel_sets, channel_statistics, derive_channels
from .errors import DataError, Problem
from .generated import GeneratedConfig
from .preprocessing import PreprocessConfig, preprocess, read_bgr

__all__ = [
    "CHANNEL_NAMES",
    "DataError",
    "GeneratedConfig",
    "ImageDataset",
    "ImageSplit",
    "PreprocessConfig",
    "Problem",
    "channel_sets",
    "channel_statistics",
    "default_cache_dir",
    "derive_channels",
    "load_dataset",
    "load_list",
    "preprocess",
    "read_bgr",
]
