"""What a model brings to be trained: networks, data, losses, validation and files."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from training.model_card import CardText
from training.validation import Validation


class TrainingTask(nn.Module, abc.ABC):
    """What is trained. A module, so that one call of it is one forward pass in every process.

    Its children are the networks, and those of their parameters that require gradients are trained.
    Learning rates, clipping and logs tell networks apart by the child's name.
    """

    @abc.abstractmethod
    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return ``loss``, a scalar that is a mean over the batch, and its parts for the log.

        Args:
            batch: samples of :meth:`training_samples`, stacked, on the device of the task.
            step: optimiser steps done.
        """

    @abc.abstractmethod
    def training_samples(self) -> Dataset[dict[str, Tensor]]:
        """Return samples by number, endless, each a function of the seed and its number alone."""

    @abc.abstractmethod
    def begin_step(self, step: int) -> None:
        """Set what changes over the run to the values of optimiser step `step`."""

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay pulls this trained parameter to zero; by default all are."""
        return True

    @abc.abstractmethod
    def as_saved(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the networks are as inference has them."""

    @abc.abstractmethod
    def validate(self) -> Validation | None:
        """Return scores on held-out samples, if there are any. No gradients are recorded."""

    @abc.abstractmethod
    def validation_summary(self, scores: Mapping[str, Any]) -> str:
        """Return one line about `scores` for people who watch."""

    @abc.abstractmethod
    def save_weights(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save what inference loads from a checkpoint.

        Args:
            folder: it exists.
            trained: all trained parameters by name; those of the networks may be spread over
                several processes.
        """

    @abc.abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Load what `save_weights` saved, strictly."""

    def save_training_state(self, folder: Path) -> None:  # noqa: B027 - most have none
        """Save what training needs to go on and inference does not: networks that judge, say."""

    def load_training_state(self, folder: Path) -> None:  # noqa: B027
        """Load what `save_training_state` saved."""

    @abc.abstractmethod
    def save_result(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Save the result of the run, under `as_saved`; arguments as of `save_weights`."""

    @abc.abstractmethod
    def card_text(self, scores: Mapping[str, Any], log: list[dict[str, Any]]) -> CardText:
        """Return what the model card says about this model."""


def trained_parameters(task: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of `task` that require gradients, by name."""
    return {name: value for name, value in task.named_parameters() if value.requires_grad}
