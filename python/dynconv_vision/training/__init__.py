# SPDX-License-Identifier: BSD-3-Clause
"""Training: settings, batches, the LightningModule, exact resume, and the frame of both studies."""

from __future__ import annotations

from .callbacks import EpochRecord, TrainingInterrupted
from .checkpoints import ModelCard, load_network, read_card, read_checkpoint
from .config import StudyError, TrainConfig
from .datamodule import Batch, EvaluationLoader, ImageDataModule, TrainLoader, epoch_order, prepare_images
from .hardware import describe_hardware, resolve_device, resolve_precision
from .module import CHANNELS, ClassificationModule, select_channels
from .train import Predictions, TrainResult, evaluate_model, predict, train_model

__all__ = [
    "CHANNELS",
    "Batch",
    "ClassificationModule",
    "EpochRecord",
    "EvaluationLoader",
    "ImageDataModule",
    "ModelCard",
    "Predictions",
    "StudyError",
    "TrainConfig",
    "TrainLoader",
    "TrainResult",
    "TrainingInterrupted",
    "describe_hardware",
    "epoch_order",
    "evaluate_model",
    "load_network",
    "predict",
    "prepare_images",
    "read_card",
    "read_checkpoint",
    "resolve_device",
    "resolve_precision",
    "select_channels",
    "train_model",
]
