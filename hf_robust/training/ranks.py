# SPDX-License-Identifier: Apache-2.0
"""What the processes of a training tell each other: errors, what has to be the same, and which of them has stopped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.distributed import distributed_c10d

from ..errors import HfRobustError, RankMismatchError
from .same_run import bit_digest, differences, listed

Result = TypeVar("Result")
LONGEST_SEARCH = 60.0  # seconds that a rank is given to say that it is there
OF_A_COLLECTIVE = re.compile("gloo|nccl|connection|timeout|timed out|pair closure", re.IGNORECASE)


def on_first_rank(work: Callable[[], Result], accelerator: Accelerator) -> Result:
    """Does something on the first rank alone; what comes of it, a result or an error, comes of it on every rank.

    Args:
        work: what to do.
        accelerator: the trainer's.

    Example:
        >>> on_first_rank(lambda: Path("runs").mkdir(), accelerator)
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error if accelerator.num_processes == 1 else _sendable(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def raise_on_all(problem: Exception | None, accelerator: Accelerator) -> None:
    """Raises the error of the first rank that has one on every rank, so that none waits for one that has gone.

    Args:
        problem: this rank's error; None for none.
        accelerator: the trainer's.
    """
    if accelerator.num_processes > 1:
        failed = torch.tensor([problem is not None], dtype=torch.uint8, device=accelerator.device)
        if not accelerator.gather(failed).any():
            return
        found = gather_object([None if problem is None else _sendable(problem)])
        problem = next(error for error in found if error is not None)
    if problem is not None:
        raise problem


def check_agreement(facts: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Refuses to go on where ranks differ in what has to be the same.

    Args:
        facts: names and values, of what JSON can hold.
        accelerator: the trainer's.

    Raises:
        RankMismatchError: they do, on every rank; the message names the ranks that differ from most.
    """
    if accelerator.num_processes == 1:
        return
    of_ranks = gather_object([dict(facts)])
    counts = Counter(map(repr, of_ranks))
    if len(counts) == 1:
        return
    most = counts.most_common(1)[0][0]
    usual = next(one for one in of_ranks if repr(one) == most)
    odd = {rank: differences(usual, one) for rank, one in enumerate(of_ranks) if repr(one) != most}
    rank, found = next(iter(odd.items()))
    others = listed(found).replace(" was ", " is elsewhere ").replace(", is ", ", here ")
    what = f"rank {rank} differs from {'the others' if len(of_ranks) > 2 else 'rank 0'}: {others}"
    remedy = "Start all ranks with the same model, data and settings."
    raise RankMismatchError(what, got=None if len(odd) == 1 else f"ranks {sorted(odd)}", remedy=remedy)


def entries_digest(model: nn.Module) -> str:
    """Returns a digest of what says where a sparse adapter trains.

    Args:
        model: the model, whole.
    """
    return bit_digest((name, buffer) for name, buffer in model.named_buffers() if not buffer.is_floating_point())


@contextmanager
def naming_the_missing(accelerator: Accelerator, timeout: float) -> Iterator[None]:
    """Inside the context a wait for a rank that has stopped or died ends with an error that names it.

    Over NCCL, whose own watchdog ends the process, it has no name.

    Args:
        accelerator: the trainer's.
        timeout: how long to wait, in seconds; Trainer gives it to the process group itself, but not on CPUs.

    Raises:
        RankMismatchError: a rank has not answered.
    """
    if accelerator.num_processes == 1:
        yield
        return
    distributed_c10d._set_pg_timeout(timedelta(seconds=timeout))
    search = timedelta(seconds=min(timeout, LONGEST_SEARCH))
    group = dist.new_group(backend="gloo", timeout=search)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, HfRobustError) and OF_A_COLLECTIVE.search(str(error)):
            _name_the_missing(group, search, error)
        raise
    else:
        dist.destroy_process_group(group)


def _name_the_missing(group: Any, search: timedelta, error: RuntimeError) -> None:
    try:
        dist.monitored_barrier(group, search, wait_all_ranks=True)
    except RuntimeError as answer:
        missing = sorted({int(rank) for rank in re.findall(r"[Rr]anks? (\d+)", str(answer))} - {dist.get_rank()})
        names = ", ".join(map(str, missing)) or "unknown"
        what = f"rank {names} has stopped: it does not answer"
        remedy = "Look for its error, or for a process that was killed or is stuck. ddp_timeout is how long to wait."
        raise RankMismatchError(what, where=f"rank {dist.get_rank()}", remedy=remedy) from error


def _sendable(error: Exception) -> Exception:
    """Another rank may know neither the error's class nor what it holds."""
    return error if isinstance(error, HfRobustError) else RuntimeError(f"{type(error).__name__}: {error}")
