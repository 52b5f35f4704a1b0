# SPDX-License-Identifier: Apache-2.0
"""OGEN over the epochs of a training: the weights of its terms, its teacher, and what a checkpoint keeps of it."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import AdapterFileError
from .classifier import OGENClassifier, OGENOutput
from .distillation import LocalMeanTeacher

FILE = "ogen.safetensors"  # of a checkpoint; never of a saved model


class OGENTraining:
    """What OGEN needs beside the classifier while it is trained.

    Args:
        classifier: the classifier to train.

    Example:
        >>> ogen = OGENTraining(classifier)
        >>> for epoch in range(10):
        ...     ogen.start_epoch(epoch, epochs=10)
        ...     for batch in batches:
        ...         loss = sum(ogen.terms(classifier(**batch)).values())
    """

    def __init__(self, classifier: OGENClassifier) -> None:
        config = classifier.ogen
        self.classifier, self.config = classifier, config
        windows = config.largest_window, config.smallest_window
        self.history = LocalMeanTeacher(*windows, config.average, config.decay)
        self.epoch = -1
        self.epochs_kept = 0
        self.weights: dict[str, float] = {}
        classifier.teacher = None

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Sets weights and teacher for an epoch, once; the tensors of the epoch before are kept for the teacher.

        Args:
            epoch: epochs done.
            epochs: epochs of the whole training.
        """
        if epoch == self.epoch:
            return
        self.epoch, self.weights = epoch, self.config.weights(epoch, epochs)
        if epoch > self.epochs_kept:  # not when an epoch is resumed in its middle
            self.history.keep(self.classifier.trained_tensors())
            self.epochs_kept = epoch
        if self.weights["distillation_known"] > 0 and len(self.history) > 0:
            self.classifier.set_teacher(self.history.average(epoch, epochs))

    def terms(self, output: OGENOutput) -> dict[str, Tensor]:
        """Returns the terms of the loss with their weights, 0-dim, by name.

        Args:
            output: what the classifier returned in training.
        """
        terms = {"cross_entropy": output.loss, **(output.terms or {})}
        return {name: self.weights[name] * term for name, term in terms.items() if term is not None}

    def save(self, folder: str | Path) -> None:
        """Writes generator, kept epochs and the state of the noise, for an exact resume.

        Args:
            folder: of the checkpoint.
        """
        tensors = {f"generator.{name}": tensor for name, tensor in self.classifier.generator.state_dict().items()}
        tensors |= {f"history.{name}": tensor for name, tensor in self.history.state_dict().items()}
        tensors["noise"] = self.classifier.noise.get_state()
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            Path(folder, FILE),
            metadata={"epochs_kept": str(self.epochs_kept)},
        )

    def load(self, folder: Path) -> None:
        """Reads back what `save` wrote.

        Args:
            folder: of the checkpoint.

        Raises:
            AdapterFileError: the checkpoint is not of a training with OGEN.
        """
        file = folder / FILE
        if not file.exists():
            remedy = "Resume from a checkpoint of a training with the same ogen=OGENConfig(...)."
            raise AdapterFileError("checkpoint has no state of OGEN", where=str(folder), got=None, remedy=remedy)
        device = next(self.classifier.generator.parameters()).device
        tensors = load_file(file)
        generator, saved = self.classifier.generator, _below("generator.", tensors)
        expected, found = ({name: t.shape for name, t in one.items()} for one in (generator.state_dict(), saved))
        if found != expected:
            remedy = "Resume with the OGENConfig it was trained with."
            raise AdapterFileError("checkpoint has another generator", where=str(file), got=found, remedy=remedy)
        generator.load_state_dict(saved)
        kept = {name: tensor.to(device) for name, tensor in _below("history.", tensors).items()}
        self.history.load_state_dict(kept)
        self.classifier.noise.set_state(tensors["noise"])
        with safe_open(file, "pt") as opened:
            self.epochs_kept = int(opened.metadata()["epochs_kept"])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
