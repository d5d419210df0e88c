# SPDX-License-Identifier: BSD-3-Clause
"""The networks of the two studies, by name.

=====================  ====== ==========================================================================================
name                   task   network
=====================  ====== ==========================================================================================
``resnet18``           task1  the plain baseline
``static_resnet18``    task1  a plain stem over any set of named channels: baseline and specialists
``variable_resnet18``  task1  ours: ResNet-18 over any set of named channels, with learned kernels
``task1_published``    task1  the source report's, with its defect: random kernels, redrawn in every forward pass
``resnet34``           task2  the plain baseline
``task2_published``    task2  the source report's four convolutions, one of them deformable
``four_conv``          task2  ours: four convolutions, two of them deformable, for images of any size
=====================  ====== ==========================================================================================

Networks of Task I except ``resnet18`` take images of one to three channels and their names:
``network(x, channels=("R", "B"))``; the static and the variable one also a set a sample, see :mod:`.channels`.
"""

from .channels import ChannelNorm, StaticChannelConv, sample_channel_sets, sample_channels
from .complexity import count_flops, count_parameters
from .four_conv import ChannelGate, FourConvNet
from .registry import create_model, list_models, register_model
from .resnet import BasicResNet, VariableChannelResNet, resnet18, resnet34, static_resnet18, variable_resnet18
from .task1_published import PublishedVariableInputConv, task1_published
from .task2_published import CBAM, PixelAttention, Task2Published, task2_published
from .variable_input_conv import KernelGenerator, SharedChannelAttention, VariableInputConv

__all__ = [
    "BasicResNet",
    "CBAM",
    "ChannelGate",
    "ChannelNorm",
    "FourConvNet",
    "KernelGenerator",
    "PixelAttention",
    "PublishedVariableInputConv",
    "SharedChannelAttention",
    "StaticChannelConv",
    "Task2Published",
    "VariableChannelResNet",
    "VariableInputConv",
    "count_flops",
    "count_parameters",
    "create_model",
    "list_models",
    "register_model",
    "resnet18",
    "resnet34",
    "sample_channel_sets",
    "sample_channels",
    "static_resnet18",
    "task1_published",
    "task2_published",
    "variable_resnet18",
]
