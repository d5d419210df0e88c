# SPDX-License-Identifier: BSD-3-Clause
"""The networks of the two studies, by name.

=====================  ====== ==========================================================================================
name                   task   network
=====================  ====== ==========================================================================================
``resnet18``           task1  the plain baseline
``variable_resnet18``  task1  ours: ResNet-18 over any subset of named channels, with learned kernels
``task1_published``    task1  the source report's, with its defect: random kernels, redrawn in every forward pass
``resnet34``           task2  the plain baseline
``task2_published``    task2  the source report's four convolutions, one of them deformable
=====================  ====== ==========================================================================================

Networks of Task I except ``resnet18`` take images of one to three channels and their names:
``network(x, channels=("R", "B"))``.
"""

from .complexity import count_flops, count_parameters
from .registry import create_model, list_models, register_model
from .resnet import VariableChannelResNet18, resnet18, resnet34, variable_resnet18
from .task1_published import PublishedVariableInputConv, task1_published
from .task2_published import CBAM, PixelAttention, Task2Published, task2_published
from .variable_input_conv import SharedChannelAttention, VariableInputConv, sample_channels

__all__ = [
    "CBAM",
    "PixelAttention",
    "PublishedVariableInputConv",
    "SharedChannelAttention",
    "Task2Published",
    "VariableChannelResNet18",
    "VariableInputConv",
    "count_flops",
    "count_parameters",
    "create_model",
    "list_models",
    "register_model",
    "resnet18",
    "resnet34",
    "sample_channels",
    "task1_published",
    "task2_published",
    "variable_resnet18",
]
