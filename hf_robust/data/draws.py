# SPDX-License-Identifier: Apache-2.0
"""Random numbers that hang on the row, not on who reads it and when: what augmentation draws from."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

OfRow = Callable[[str], AbstractContextManager[None]]  # `Draws.of` for one row
DRAW = "hf_robust_draw"  # the column by which a row knows what it draws


@contextmanager
def kept_states() -> Iterator[None]:
    """Gives the global generators of Python, numpy and torch (CPU) back the states they had before the context.

    Example:
        >>> with kept_states():
        ...     metrics = evaluate(model)
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class Draws:
    """What is drawn for the rows of a run: the same for a seed, an epoch and a row, in any order and any process.

    The epoch lies in shared memory: workers that outlive an epoch see the next one.

    Args:
        seed: of the run.

    Example:
        >>> draws = Draws(seed=42)
        >>> draws.set_epoch(3)
        >>> with draws.of(17, "image"):
        ...     flipped = torchvision.transforms.v2.RandomHorizontalFlip()(image)
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Makes rows draw other numbers from now on.

        Args:
            epoch: the number of the epoch.
        """
        self._epoch.fill_(epoch)

    @contextmanager
    def of(self, row: int | tuple[int, ...], what: str) -> Iterator[None]:
        """Inside the context the global generators of Python, numpy and torch (CPU) draw what belongs to a row.

        Afterwards they have the state they had before. Accelerators' generators are left alone.

        Args:
            row: its place in the set.
            what: what the numbers are for; for something else the same row draws others.
        """
        for_python, for_numpy, for_torch = self._seeds(row, what)
        with kept_states():
            random.seed(for_python)
            np.random.seed(for_numpy)
            torch.default_generator.manual_seed(for_torch)  # torch.manual_seed would set those of accelerators too
            yield

    def _seeds(self, row: int | tuple[int, ...], what: str) -> list[int]:
        """One for each generator, of 32 bits: those of numpy and torch are of one kind, and would go the same way."""
        key = f"{self.seed} {int(self._epoch)} {row} {what}"
        return np.frombuffer(hashlib.blake2b(key.encode(), digest_size=12).digest(), "<u4").tolist()


def with_draws(rows: Iterable[Any], draws: Draws) -> Iterator[tuple[Any, OfRow]]:
    """Yields the rows of a stream, each read in the context in which it draws, and with what goes into its `DRAW`.

    A row is told by its place in the stream, and in the part of it that a worker reads.

    Args:
        rows: the stream.
        draws: of the run.
    """
    worker = torch.utils.data.get_worker_info()
    part, iterator, end = 0 if worker is None else worker.id, None, object()
    for number in count():
        of_row = partial(draws.of, (part, number))
        with of_row("row"):
            iterator = iter(rows) if iterator is None else iterator
            row = next(iterator, end)
        if row is end:
            return
        yield row, of_row


def drawing(row: Mapping[str, Any], what: str) -> AbstractContextManager[None]:
    """Returns the context in which a row draws, see `Draws.of`; one that does nothing for a row without `DRAW`.

    Args:
        row: of a dataset.
        what: what the numbers are for.
    """
    of_row = row.get(DRAW)
    return nullcontext() if of_row is None else of_row(what)


class DrawingCollator:
    """Lets a collator draw what belongs to the first row of the batch.

    Args:
        collator: any, of rows that may have `DRAW`.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, torch.Tensor]]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Batches the rows."""
        with drawing(rows[0], "batch"):
            return self.collator(list(rows))
