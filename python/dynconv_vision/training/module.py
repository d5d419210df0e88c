# SPDX-License-Identifier: BSD-3-Clause
"""The LightningModule that both studies train their networks with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from dynconv_ext import DeformableConv2d
from dynconv_vision.data.derived import derive_channels
from dynconv_vision.models import sample_channel_sets, sample_channels

from .config import StudyError, TrainConfig
from .datamodule import Batch, mix_seed

CHANNELS = ("R", "G", "B")


class ClassificationModule(pl.LightningModule):
    """Cross-entropy training of an image classifier.

    Logs train_loss, train_acc, val_loss and val_acc, accuracies in percent; those of training are means over the epoch
    while the weights change, over the channels that were drawn; so are those of validation, on a draw that stays.

    Args:
        model: Network from images (B, 3, S, S) in [0, 1] to logits (B, num_classes). Modules of it that have
            `anneal(progress, until)` are told before each step how far training is.
        config: Settings. With channels other than R, G, B, or with `channel_sampling`, the network is called as
            `model(images, channels=names)` and, where sets are drawn an image, with `present`.
        num_classes: Number of classes.
        image_size: Height and width of the images, in pixels.
        card: Plain values that are saved in each checkpoint for whoever loads it.
        teacher: A trained network from the same images to logits; the settings' `distillation` is its weight.

    Raises:
        StudyError: The settings want named channels and the network does not take them, or not an image; or they want a
            teacher and there is none, or the other way round.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        num_classes: int,
        image_size: int,
        card: dict[str, Any] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.config, self.image_size, self.card = model, config, image_size, dict(card or {})
        self._named = config.channel_sampling != "none" or config.channels != CHANNELS or config.unknown_share > 0
        if self._named and not accepts_channels(model):
            raise StudyError(
                f"channel_sampling: got {config.channel_sampling!r} on channels {', '.join(config.channels)}, but "
                f"{type(model).__name__} does not take named channels"
            )
        if config.channel_sampling == "image" and not _accepts(model, "present"):
            raise StudyError(
                f"channel_sampling: got 'image', but {type(model).__name__} takes one set of channels for all images"
            )
        if (teacher is None) != (config.distillation == 0):
            raise StudyError(f"distillation: got {config.distillation}, but {'no' if teacher is None else 'a'} teacher")
        # In a tuple, so that it is no part of the module: checkpoints hold the pupil alone.
        self._teacher = () if teacher is None else (teacher.requires_grad_(False),)
        self._mix = _make_mix(config.mix, num_classes)
        self._annealed = [module for module in model.modules() if hasattr(module, "anneal")]
        #: What is validated, tested and saved as the best; None: the model itself.
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            self.average = AveragedModel(model, multi_avg_fn=_moving_average(config.ema_decay), use_buffers=True)
        metrics: dict[str, Metric] = {}
        for stage in ("train", "val"):
            metrics[f"{stage}_loss"] = mean_loss()
            metrics[f"{stage}_acc"] = MulticlassAccuracy(num_classes, average="micro")
        self.metrics = nn.ModuleDict(metrics)
        self.loss = nn.CrossEntropyLoss(reduction="none", label_smoothing=config.label_smoothing)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to logits (B, num_classes)."""
        return self.model(images)

    def on_fit_start(self) -> None:
        for teacher in self._teacher:
            teacher.to(self.device).eval()
        # A network may draw constants in its first call. They are drawn here, under the seed, so that a resumed
        # training draws those of the first one.
        images = torch.zeros(1, len(self.config.channels), self.image_size, self.image_size, device=self.device)
        named = {"channels": self.config.channels} if self._named else {}
        for model in [self.model] if self.average is None else [self.model, self.average.module]:
            torch.manual_seed(mix_seed(self.config.seed, 0))
            with torch.no_grad():
                model.eval()(images, **named)
        self.model.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.manual_seed(batch.seed)
        if self.config.temperature_anneal is not None:
            epoch = self.current_epoch + batch_idx / self.trainer.num_training_batches
            for module in self._annealed:
                module.anneal(epoch / self.config.epochs, self.config.temperature_anneal)
        images, named = self._inputs(batch)
        labels = batch.labels
        if self._mix is not None and torch.rand(()) < self.config.mix_share:
            images, labels = self._mix(images, labels)
        if self.config.unknown_share and torch.rand(()) < self.config.unknown_share:
            names = list(named["channels"])
            names[int(torch.randint(len(names), ()))] = None
            named["channels"] = tuple(names)
        logits = self.model(images, **named)
        losses = self.loss(logits.float(), labels)
        for teacher in self._teacher:
            losses = torch.lerp(losses, self._distillation(logits.float(), teacher(images)), self.config.distillation)
        loss = losses.mean()
        self._count("train", losses.detach(), logits.detach(), labels if labels.dim() == 1 else labels.argmax(1))
        self.log("loss", loss, prog_bar=True, batch_size=len(batch.labels))
        return loss

    def _distillation(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """(B,) Kullback-Leibler divergences of softened predictions, times T^2 so that gradients keep their size."""
        temperature = self.config.distillation_temperature
        pupil, teacher = ((each.float() / temperature).log_softmax(1) for each in (logits, wanted))
        divergence = nn.functional.kl_div(pupil, teacher, reduction="none", log_target=True).sum(1)
        return temperature**2 * divergence

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if len(batch.labels) == 0:
            return
        torch.manual_seed(batch.seed)
        images, named = self._inputs(batch)
        logits = self._validated()(images, **named)
        # Without smoothing, so that the figure compares across settings.
        losses = nn.functional.cross_entropy(logits.float(), batch.labels, reduction="none")
        self._count("val", losses, logits, batch.labels)

    def _validated(self) -> nn.Module:
        return self.model if self.average is None else self.average.module

    def _inputs(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Images and keyword arguments for the network, drawn under the seed that is set."""
        config = self.config
        if not self._named:
            return batch.images, {}
        if config.channel_sampling == "step":
            return select_channels(self.model, batch.images, sample_channels(config.channels))
        images = derive_channels(batch.images, config.channels)
        named: dict[str, Any] = {"channels": config.channels}
        if config.channel_sampling == "image":
            # Validation draws as many of each size, whatever training does: figures then compare.
            full = config.full_share if self.training else 0.0
            named["present"] = sample_channel_sets(len(images), len(config.channels), full_share=full)
        return images, named

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here and not in a hook of the step's end, some of which run after last.ckpt has been saved.
        if self.average is not None:
            self.average.update_parameters(self.model)

    def on_validation_epoch_end(self) -> None:
        self._log_and_reset("val")

    def on_train_epoch_end(self) -> None:
        self._log_and_reset("train")

    def configure_optimizers(self) -> Any:
        config = self.config
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.optimizer]
        optimizer = kind(
            self._parameter_groups(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
            **({"momentum": 0.9, "nesterov": True} if config.optimizer == "sgd" else {}),
        )
        if config.schedule == "constant" and config.warmup_epochs == 0:
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(config.warmup_epochs * total / config.epochs)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if config.schedule == "constant":
                return 1.0
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        if self.config.offset_learning_rate == 1:
            return [{"params": list(self.model.parameters())}]
        layers = [layer for layer in self.model.modules() if isinstance(layer, DeformableConv2d)]
        parts = [part for layer in layers for part in (layer.offset_conv, layer.modulator_conv) if part is not None]
        predicting = list(nn.ModuleList(parts).parameters())
        others = [parameter for parameter in self.model.parameters() if all(parameter is not p for p in predicting)]
        rate = self.config.learning_rate * self.config.offset_learning_rate
        return [{"params": others}, {"params": predicting, "lr": rate}]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning clips no fused optimiser, since one may unscale gradients itself; there is no loss scale here.
        if gradient_clip_val is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dynconv_vision"] = self.card
        if self.trainer.training:
            # Sums of the running epoch, over all processes: a resumed epoch reports what a whole one would.
            states = {}
            for name in ("train_loss", "train_acc"):
                metric = self.metrics[name]
                with metric.sync_context(should_sync=self.trainer.world_size > 1):
                    states[name] = {key: value.detach().cpu().clone() for key, value in metric.metric_state.items()}
                    states[name]["updates"] = metric.update_count
            checkpoint["running_metrics"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.global_rank != 0:
            return
        for name, state in checkpoint.get("running_metrics", {}).items():
            metric = self.metrics[name]
            metric._update_count = state.pop("updates")
            for key, value in state.items():
                setattr(metric, key, value.to(metric.device))

    def _count(self, stage: str, losses: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.metrics[f"{stage}_loss"].update(losses)
        self.metrics[f"{stage}_acc"].update(logits, labels)

    def _log_and_reset(self, stage: str) -> None:
        for name, scale, bar in ((f"{stage}_loss", 1.0, False), (f"{stage}_acc", 100.0, True)):
            metric = self.metrics[name]
            # float32 as torchmetrics sums it; every process holds the same synchronised value.
            self.log(name, metric.compute() * scale, prog_bar=bar, rank_zero_only=False)
            metric.reset()


def _moving_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], None]:
    """An update of exponential moving averages whose decay rises to `decay`, so that the start is soon forgotten."""

    def update(averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor) -> None:
        updates = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + updates) / (10 + updates)))(averages, values, count)

    return update


def _make_mix(name: str, num_classes: int) -> v2.Transform | None:
    """What `TrainConfig.mix` names: from images and class numbers to images and (B, num_classes) shares."""
    if name == "none":
        return None
    mixup, cutmix = (kind(alpha=alpha, num_classes=num_classes) for kind, alpha in ((v2.MixUp, 0.2), (v2.CutMix, 1.0)))
    return {"mixup": mixup, "cutmix": cutmix, "both": v2.RandomChoice([mixup, cutmix])}[name]


def mean_loss(**options: Any) -> MeanMetric:
    """A mean over losses, one an image.

    By default it would leave out NaN, and a diverged run would look sound. Its weights are of no use here: with
    "disable", torchmetrics 1.9 sets them all to one.
    """
    return MeanMetric(nan_strategy="disable", **options)


def use_channels_last(model: nn.Module) -> None:
    """Keep the convolution kernels of `model` in the channels-last memory format.

    `nn.Module.to` would also try parameters with five dimensions (banks of kernels), and fail.
    """
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def accepts_channels(model: nn.Module) -> bool:
    """Whether the network can be called on one, two or three named channels, `model(x, channels=("R", "B"))`."""
    return _accepts(model, "channels")


def _accepts(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def select_channels(model: nn.Module, images: Tensor, channels: Sequence[str]) -> tuple[Tensor, dict[str, Any]]:
    """Images and keyword arguments to call `model` with when it is to see only `channels`.

    Args:
        model: A network that takes named channels, or one that needs R, G and B: that gets zeros for the missing ones.
        images: (B, 3, S, S), red first.
        channels: Names, see `dynconv_vision.data.derive_channels`. Those that are not among `model.channels`, where it
            has that attribute, are passed as None: channels of unknown identity.

    Returns:
        Images (B, m, S, S) of the m channels, or (B, 3, S, S) with zeros, and what else to pass to `model`.

    Raises:
        StudyError: A name is unknown or repeated, or there is none.
    """
    channels = tuple(channels)
    if accepts_channels(model):
        try:
            images = derive_channels(images, channels)
        except ValueError as error:
            raise StudyError(str(error)) from None
        known = getattr(model, "channels", channels)
        return images, {"channels": tuple(name if name in known else None for name in channels)}
    chosen = [CHANNELS.index(name) for name in channels if name in CHANNELS]
    if not channels or len(chosen) != len(channels) or len(set(chosen)) != len(chosen):
        raise StudyError(f"channels: got {channels!r}, expected different names out of {', '.join(CHANNELS)}")
    kept = torch.zeros(len(CHANNELS), device=images.device, dtype=images.dtype)
    kept[chosen] = 1
    return images * kept.view(1, -1, 1, 1), {}
