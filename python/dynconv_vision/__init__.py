# SPDX-License-Identifier: BSD-3-Clause
"""What the image-classification studies share: ``data``, ``models``, ``training`` and ``reporting``.

Importing this package loads none of them; import the part you need, for example ``from dynconv_vision.data import
load_dataset``.
"""
