# SPDX-License-Identifier: Apache-2.0
"""What a term of the loss is: something that pulls on the change to a model while it grows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from ..errors import ConfigError, close_matches
from ..tasks.task import Batch, Progress, Task

if TYPE_CHECKING:
    from .reference import BatchReference

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda fraction: 1.0,
    "linear": lambda fraction: 1 - fraction,
    "cosine": lambda fraction: (1 + math.cos(math.pi * fraction)) / 2,
}


class Term(nn.Module):
    """A term that is added to the loss of a task in training, λ times a mean over the images.

    A term of your own is a class with a `name`, what it `needs` of the pre-trained model θ₀, and a `forward`. What is
    asked of θ₀ is computed at most once a batch, however many terms ask for it. Its parameters are trained with the
    model; they and its persistent buffers are saved in checkpoints, never in a saved model. What has another form (a
    queue, a generator) is saved too, where `get_extra_state` returns it as tensors by name. Numbers are drawn from
    `reference.task.progress.generator(...)`, which draws the same on every rank and in a resumed run.

    The arguments of a subclass are attributes of the same names, as in scikit-learn: checkpoints tell them.

    Args:
        weight: λ at the start of training, a finite number from 0.
        schedule: how λ goes on: `"constant"`, `"linear"` to 0, or `"cosine"` to 0.

    Raises:
        ConfigError: an argument is none of these.

    Example:
        >>> class Drift(Term):
        ...     name, needs = "drift", ("image_embeds",)
        ...
        ...     def forward(self, outputs, reference):
        ...         return (outputs.image_embeds - reference.image_embeds).square().sum(dim=-1).mean()
        >>> RobustTrainer(model, args, losses=[Drift(weight=2.0, schedule="linear")], ...)
    """

    name: ClassVar[str]  # in logs, as `loss_<name>`, and in files
    needs: tuple[str, ...] = ()  # of θ₀: "image_embeds", "class_embeds", "text_embeds", "weights"
    layers: tuple[str, ...] = ()  # modules of the vision tower whose hidden states it compares, by their names
    frozen_vision: ClassVar[bool] = False  # whether the vision tower must stay as it is; images are then embedded once
    whole_weights: ClassVar[bool] = False  # whether it reads or writes weights of the model, which FSDP shards

    def __init__(self, weight: float = 1.0, schedule: Literal["constant", "linear", "cosine"] = "constant") -> None:
        super().__init__()
        check_number("weight", weight, "a finite number from 0")
        check_known("schedule", schedule, tuple(SCHEDULES))
        self.weight, self.schedule = float(weight), schedule

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Term:
        """Makes a term of what stands in a YAML file: by default of its arguments by name.

        Args:
            settings: values by name.

        Raises:
            ConfigError: a name is none of an argument, one is missing, or a value is none it takes.
        """
        check_names(settings, cls.arguments(), cls.name)
        return cls(**settings)

    @classmethod
    def arguments(cls) -> dict[str, inspect.Parameter]:
        """Returns what a term is made with, by name; what `**kwargs` hands on are the arguments of `Term`."""
        given = inspect.signature(cls).parameters
        found = {n: p for n, p in given.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        return {**found, **(Term.arguments() if len(found) < len(given) else {})}

    def settings(self) -> dict[str, Any]:
        """Returns the arguments it was made with, by name.

        Raises:
            ConfigError: an argument is no attribute of the same name.
        """
        found = {}
        for name in self.arguments():
            if name not in vars(self):
                remedy = f"Set self.{name} in __init__, after super().__init__(...)."
                raise ConfigError(
                    "a loss does not keep its argument", where=type(self).__name__, got=name, remedy=remedy
                )
            found[name] = vars(self)[name]
        return found

    def told(self) -> dict[str, Any]:
        """Returns what it knows beside the training data, of what JSON can hold: a saved model states it."""
        return {}

    # --- before the first step ---

    def attach(self, task: Task) -> None:
        """Fits a new term to the task to train, which is θ₀ then; nothing by default.

        Here it refuses what it cannot be computed for, and makes what has its size from the task: parameters, tokens,
        `layers`.

        Args:
            task: the task.

        Raises:
            ConfigError: the term cannot be computed for it.
        """

    def needs_for(self, task: Task) -> tuple[str, ...]:
        """Returns what it needs of θ₀ for a task, by default `needs`.

        Args:
            task: the task.
        """
        return self.needs

    def start(self, task: Task, batches: Callable[[], Iterator[Batch]]) -> None:
        """Called at the start of a training, with `task.reference` at hand; nothing by default.

        Args:
            task: the task.
            batches: returns this rank's share of the training set once, batch by batch, without augmentation.
        """

    def start_epoch(self, task: Task, progress: Progress) -> None:
        """Called before the first step of an epoch, or of what is left of it in a resumed run; nothing by default.

        Args:
            task: the task; no forward of it waits for its backward.
            progress: where the training is.
        """

    # --- in every step ---

    def task_weight(self, progress: Progress) -> float:
        """Returns what the loss of the task itself is multiplied by while this term is there.

        Args:
            progress: where the training is.
        """
        return 1.0

    def weight_at(self, progress: Progress) -> float:
        """Returns λ at a point of training.

        Args:
            progress: where the training is.

        Example:
            >>> SimilarityLoss(weight=2.0, schedule="cosine").weight_at(Progress(step=50, steps=100))
            1.0
        """
        return self.weight * SCHEDULES[self.schedule](progress.fraction)

    def forward(self, outputs: Any, reference: BatchReference) -> Tensor | dict[str, Tensor]:
        """Returns the term for a batch, without its weight, a mean over the images, 0-dim; or parts of it by name.

        Args:
            outputs: what the task returned, a `TaskOutput`.
            reference: θ₀'s answers for the batch.

        Raises:
            ConfigError: a subclass has no `forward`.
        """
        remedy = "Define forward(self, outputs, reference)."
        raise ConfigError("a loss has no `forward`", where=type(self).__name__, remedy=remedy)

    def weighted(self, name: str, outputs: Any, reference: BatchReference, progress: Progress) -> dict[str, Tensor]:
        """Returns what is added to the loss, 0-dim, by the names it is logged under.

        Args:
            name: of the term; a part is called `<name>_<part>`.
            outputs: what the task returned.
            reference: θ₀'s answers for the batch.
            progress: where the training is.

        Raises:
            ConfigError: `forward` returned something else than 0-dim tensors, or parts whose names are no strings.
        """
        weight, found = self.weight_at(progress), self(outputs, reference)
        parts = found if isinstance(found, Mapping) else {"": found}
        for key, part in parts.items():
            if not isinstance(part, Tensor) or part.ndim > 0 or not isinstance(key, str):
                got = tuple(part.shape) if isinstance(part, Tensor) and part.ndim > 0 else type(part).__name__
                got = got if isinstance(key, str) else f"a part called {key!r}"
                allowed = "a 0-dim tensor, the mean over the images, or several by name"
                raise ConfigError("a term returned no loss", where=f"losses, {name}", got=got, allowed=allowed)
        return {f"{name}_{part}" if part else name: weight * value for part, value in parts.items()}

    def extra_repr(self) -> str:
        """Shows the settings in the module's `repr`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


def check_term(name: Any, term: Term) -> None:
    """Refuses a term that no task can hold.

    Args:
        name: what it is called.
        term: the term.

    Raises:
        ConfigError: the name is no identifier or one that PyTorch takes, or `Term.__init__` was not called.
    """
    where = type(term).__name__
    if not isinstance(name, str) or not name.isidentifier():
        allowed = "a `name` of letters, digits and underscores"
        raise ConfigError("a loss has no name to log it by", where=where, got=name, allowed=allowed)
    if name in dir(nn.ModuleDict()):
        remedy = "Give it another `name`."
        raise ConfigError("a loss has the name of an attribute of nn.ModuleDict", where=where, got=name, remedy=remedy)
    if "_parameters" not in vars(term):
        remedy = "Call super().__init__(...) first in its __init__."
        raise ConfigError("a loss was made without Term.__init__", where=where, remedy=remedy)


def check_names(settings: Mapping[str, Any], known: Mapping[str, inspect.Parameter], name: str) -> None:
    """Refuses settings that a function does not take, and a lack of those that it needs.

    Args:
        settings: values by name.
        known: what it takes, by name.
        name: of the term, for the message.

    Raises:
        ConfigError: a name is unknown, or one is missing.
    """
    for given in settings:
        if given not in known:
            remedy = close_matches(str(given), list(known))
            raise ConfigError("unknown setting of a loss", where=f"losses, {name}", got=given, remedy=remedy)
    missing = [one for one, parameter in known.items() if parameter.default is parameter.empty and one not in settings]
    if missing:
        raise ConfigError("a loss lacks settings", where=f"losses, {name}", got=sorted(settings), allowed=str(missing))


def check_known(argument: str, got: Any, allowed: tuple[str, ...]) -> None:
    """Refuses a value that is not among those allowed.

    Args:
        argument: its name.
        got: the value.
        allowed: what is.

    Raises:
        ConfigError: it is not.
    """
    if got not in allowed:
        raise ConfigError(f"unknown {argument}", where="losses", got=got, allowed=", ".join(map(repr, allowed)))


def check_number(argument: str, got: Any, allowed: str) -> None:
    """Refuses what is no finite number from 0.

    Args:
        argument: its name.
        got: the value.
        allowed: for the message.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(got, bool) or not isinstance(got, int | float) or not 0 <= got < math.inf:
        raise ConfigError(f"{argument} is out of range", where="losses", got=got, allowed=allowed)


def check_count(argument: str, got: Any) -> None:
    """Refuses what is no whole number from 1.

    Args:
        argument: its name.
        got: the value.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(got, bool) or not isinstance(got, int) or got < 1:
        raise ConfigError(f"{argument} is no count", where="losses", got=got, allowed="a whole number from 1")
