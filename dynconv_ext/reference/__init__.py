# SPDX-License-Identifier: BSD-3-Clause
"""Readable pure-PyTorch forms of the operators: any device, twice differentiable, no extension needed."""

from dynconv_ext.reference.deform_conv2d import deform_conv2d

__all__ = ["deform_conv2d"]
