# SPDX-License-Identifier: BSD-3-Clause
"""Modulated deformable convolution and dynamic convolution for PyTorch."""

from dynconv_ext import reference
from dynconv_ext._extension import build_info
from dynconv_ext.deform_conv2d import DeformableConv2d, DeformConv2d, deform_conv2d
from dynconv_ext.dynamic_conv2d import DynamicConv2d, aggregate_kernels, dynamic_conv2d

__version__ = "0.1.0"

__all__ = [
    "DeformConv2d",
    "DeformableConv2d",
    "DynamicConv2d",
    "aggregate_kernels",
    "build_info",
    "deform_conv2d",
    "dynamic_conv2d",
    "reference",
]
