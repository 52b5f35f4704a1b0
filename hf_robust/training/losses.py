# SPDX-License-Identifier: Apache-2.0
"""The terms of the loss of a training, and what they need of the pre-trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from ..data.text_files import parse_json
from ..errors import ConfigError, DataError
from ..interpolation.adapters import linear_tensors
from ..interpolation.linear import LinearTensor
from ..losses.context import ContextLoss
from ..losses.features import FeatureLoss
from ..losses.lipsum import LipsumLoss
from ..losses.named import terms_of
from ..losses.reference import Moved
from ..losses.similarity import SimilarityLoss
from ..losses.spuriosity import SpuriosityLoss
from ..losses.term import Term
from ..losses.weights import WeightLoss
from ..ogen import OGENLoss
from ..tasks.task import Task

TERMS: dict[str, type[Term]] = {  # by their names in YAML files
    "similarity": SimilarityLoss,
    "lipsum": LipsumLoss,
    "context": ContextLoss,
    "features": FeatureLoss,
    "weights": WeightLoss,
    "spuriosity": SpuriosityLoss,
    "ogen": OGENLoss,
}


def settings_of(given: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns the settings of terms, as they stand in a YAML file or, as JSON, on the command line.

    Args:
        given: settings by the names of terms, or JSON of them.

    Raises:
        ConfigError: it is no JSON, or a name or setting is unknown or out of range.

    Example:
        >>> settings_of('{"similarity": {"weight": 10.0}}')
        {'similarity': {'weight': 10.0}}
    """
    allowed = '{"name": {"setting": value, …}}'
    try:
        found: Any = parse_json(given, "losses") if isinstance(given, str) else given
    except DataError as error:
        raise ConfigError("settings of losses cannot be read", where="losses", got=given, allowed=allowed) from error
    if not isinstance(found, Mapping | None):
        raise ConfigError("settings of losses are no mapping", where="losses", got=given, allowed=allowed)
    terms_of(found, TERMS)
    return None if found is None else dict(found)


def losses_of(settings: str | Mapping[str, Any] | None, given: Sequence[Term] | None) -> dict[str, Term]:
    """Returns the terms of a training by name.

    Args:
        settings: those of its arguments.
        given: what the trainer was given.

    Raises:
        ConfigError: something is no term, or one is there twice.
    """
    return terms_of([*terms_of(settings_of(settings), TERMS).values(), *terms_of(given, TERMS).values()], TERMS)


def check_sharded(accelerator: Accelerator, task: Task) -> None:
    """Refuses terms that read whole weights, where they are sharded.

    Args:
        accelerator: the trainer's.
        task: with its terms.

    Raises:
        ConfigError: one does.
    """
    if getattr(accelerator.state, "fsdp_plugin", None) is None:
        return
    for name, term in task.terms.items():
        if term.whole_weights or "weights" in term.needs_for(task):
            what, remedy = "a loss reads whole weights, which FSDP shards", "Use DDP."
            raise ConfigError(what, where=f"losses, {name}", got="FSDP", remedy=remedy)


class StartingPoint:
    """Where the trained tensors of a task started, for terms that need `"weights"`.

    Args:
        zero_shot: θ₀ of parameters that are trained without adapter, by name; None with adapters.
    """

    def __init__(self, zero_shot: Mapping[str, Tensor] | None) -> None:
        self.zero_shot = zero_shot
        self.tensors: list[LinearTensor] | None = None
        self.names: list[str] = []  # of the parameters: those of tensors are for messages, and may be there twice
        self.starts: list[Tensor] = []  # made once: hundreds of small tensors of zeros cost time

    def __call__(self, task: Task) -> dict[str, Moved]:
        """Returns the tensors in which Δ is linear, by the names of the task's parameters.

        Args:
            task: what is trained; always the same.

        Raises:
            ConfigError: Δ is linear in averages, which have no gradient (R-Adapter).
        """
        if self.tensors is None:
            device, known = next(task.parameters()).device, self.zero_shot
            on_device = None if known is None else {name: tensor.to(device) for name, tensor in known.items()}
            self.tensors = linear_tensors(task, on_device)
            averages = [tensor.name for tensor in self.tensors if not isinstance(tensor.parameter, nn.Parameter)]
            if averages:
                what, remedy = "a loss reads weights, and these are averages of them", "Set average_decay=None."
                raise ConfigError(what, where="losses", got=averages[0], remedy=remedy)
            names = {id(parameter): name for name, parameter in task.named_parameters()}
            self.names = [names[id(tensor.parameter)] for tensor in self.tensors]
            self.starts = [tensor.start for tensor in self.tensors]
        rows = zip(self.names, self.tensors, self.starts, strict=True)
        return {name: Moved(tensor.parameter, start) for name, tensor, start in rows}
