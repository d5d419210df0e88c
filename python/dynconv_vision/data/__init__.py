# SPDX-License-Identifier: BSD-3-Clause
"""Datasets for the studies: found, checked, preprocessed once and then mapped into memory.

Importing it loads no torch, for which every worker process would wait; ``dynconv_vision.data.derived``, channels made
of others, does.

>>> from dynconv_vision.data import load_dataset
>>> data = load_dataset("generated", image_size=32, limits={"train": 100, "val": 50, "test": 50}, progress=False)
>>> data.train.images.shape, data.train.labels.dtype, len(data.classes)
((100, 3, 32, 32), dtype('int64'), 50)
"""

from .cache import default_cache_dir
from .dataset import ImageDataset, ImageSplit, load_dataset, load_list
from .errors import DataError, Problem
from .generated import GeneratedConfig
from .preprocessing import PreprocessConfig, preprocess, read_bgr

__all__ = [
    "DataError",
    "GeneratedConfig",
    "ImageDataset",
    "ImageSplit",
    "PreprocessConfig",
    "Problem",
    "default_cache_dir",
    "load_dataset",
    "load_list",
    "preprocess",
    "read_bgr",
]
