# SPDX-License-Identifier: Apache-2.0
"""A training that is told to stop saves first; and one that another job shares a folder with does not start."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import CheckpointError

logger = logging.getLogger(__name__)

LOCK, HOLDER = ".hf_robust-lock", ".hf_robust-lock-holder"
# of an operating system, a user, and a scheduler that warns, which Windows lacks
SIGNALS = [one for one in signal.Signals if one.name in ("SIGTERM", "SIGINT", "SIGUSR1")]
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
LONGEST_NAME = 200  # characters read of who holds a lock


class StopAtSignal(TrainerCallback):
    """Saves a checkpoint and exits with 128 + n after a step in which a rank has received signal n.

    A signal that the program handles itself stays its own. After the first one, another Ctrl-C stops at once. The
    checkpoint of an epoch's last step is saved after the evaluation at its end, where there is one.

    Example:
        >>> stop = StopAtSignal()
        >>> with stop.listening():
        ...     trainer.train()
    """

    received = 0  # by this rank
    agreed = 0  # by any rank, as all know since this step
    is_due = False  # the next checkpoint is the last
    is_extra = False  # it is not one of those that the settings ask for
    waits = False  # a checkpoint waits for the evaluation at the end of the epoch

    def __init__(self) -> None:
        self.listens = torch.zeros((), dtype=torch.bool).share_memory_()  # as workers see, too

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the context signals are noted, and nothing else happens when they come."""
        self.received, self.agreed, self.is_due, self.is_extra, self.waits = 0, 0, False, False, False
        before = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
            for number in SIGNALS:
                if signal.getsignal(number) in DEFAULTS:
                    before[number] = signal.signal(number, self._note)
            self.listens.fill_(True)
        try:
            yield
        finally:
            self.listens.fill_(False)
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.received:  # after the last step: there was nothing left to stop
            signal.raise_signal(self.received)

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        how = "when the step has ended a checkpoint is saved, and training stops; another Ctrl-C stops at once"
        logger.warning("%s: %s.", signal.Signals(number).name, how)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks for a checkpoint; after the last step of an epoch what is evaluated at its end comes first.

        A run that was resumed from a checkpoint of that step would go on without that evaluation.

        Args:
            args: the training arguments.
            state: of the training.
            control: what to do next.
            kwargs: of no use here.
        """
        ends_epoch = float(state.epoch or 0).is_integer()
        if ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH:
            self.waits, control.should_save = control.should_save, False
        elif self.agreed and not ends_epoch:
            self._ask(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks for a checkpoint.

        Args:
            args: the training arguments.
            state: of the training.
            control: what to do next.
            kwargs: of no use here.
        """
        control.should_save = control.should_save or self.waits
        self.waits = False
        if self.agreed:
            self._ask(control)

    def _ask(self, control: TrainerControl) -> None:
        self.is_extra = not control.should_save
        control.should_save = self.is_due = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Exits.

        Args:
            args: the training arguments.
            state: of the training.
            control: what to do next.
            kwargs: of no use here.

        Raises:
            SystemExit: the checkpoint was the last.
        """
        if self.is_due:
            name = signal.Signals(self.agreed).name
            if state.is_world_process_zero:
                how = "resume_from_checkpoint=True (in a script: last) goes on from there"
                if args.save_only_model:
                    how = "save_only_model=True keeps nothing to resume from"
                logger.warning("%s: saved after step %d; %s.", name, state.global_step, how)
            raise SystemExit(128 + self.agreed)


def leave_signals(then: Callable[[int], None] | None, listens: Tensor, worker: int) -> None:
    """Makes a worker of a `DataLoader` ignore signals to stop, which a scheduler sends to all processes of a job.

    After the training SIGTERM ends it: so Python ends its workers, and waits for them, when it exits.

    Args:
        then: what else to do when the worker starts.
        listens: of the `StopAtSignal` of the process that it works for, 0-dim, in shared memory.
        worker: its number.
    """

    def leave(number: int, frame: Any) -> None:
        if not listens:
            os._exit(0)  # as torch's own handler: any other end is an error of the process that waits

    for number in SIGNALS:
        signal.signal(number, leave if number == signal.SIGTERM else signal.SIG_IGN)
    if then is not None:
        then(worker)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside the context no other process gets the lock of a folder; it ends with the process, however that dies.

    Args:
        folder: it is made where it is missing.

    Raises:
        CheckpointError: another process has the lock, or the folder cannot be written to.

    Example:
        >>> with locked(Path("runs/saft")):
        ...     trainer.train()
    """
    lock, holder = filelock.FileLock(folder / LOCK, timeout=0), folder / HOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except filelock.Timeout as error:
        remedy = "Give this one another output_dir, or wait for it."
        what, got = "another training saves into this folder", _read(holder)
        raise CheckpointError(what, where=str(folder), got=got, remedy=remedy) from error
    except OSError as error:
        raise CheckpointError(f"folder cannot be written to ({error})", where=str(folder)) from error
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _read(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8")[:LONGEST_NAME]
    except (OSError, UnicodeDecodeError):
        return "unknown"
