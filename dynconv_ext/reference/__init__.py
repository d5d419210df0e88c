# SPDX-License-Identifier: BSD-3-Clause
"""Readable pure-PyTorch forms of the operators: any device, twice differentiable, no extension needed."""

from dynconv_ext.reference.deform_conv2d import deform_conv2d
from dynconv_ext.reference.dynamic_conv2d import aggregate_kernels, dynamic_conv2d

__all__ = ["aggregate_kernels", "deform_conv2d", "dynamic_conv2d"]
