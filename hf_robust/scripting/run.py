# SPDX-License-Identifier: Apache-2.0
"""From the command line to a script's `main`, and to its exit status."""

from __future__ import annotations

import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from logging import INFO, basicConfig, getLogger
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
from accelerate import PartialState
from huggingface_hub.utils import enable_progress_bars
from tqdm.auto import tqdm
from transformers import TrainingArguments
from transformers.utils import logging

from ..errors import HfRobustError
from .arguments import parse_arguments
from .progress import is_verbose

FAILED = 2  # as after a wrong flag in argparse


def run(
    main: Callable[..., None],
    *types: Any,
    defaults: Mapping[str, Any] | None = None,
    flags: Sequence[str] | None = None,
    program: str | None = None,
    example: str | None = None,
) -> None:
    """Reads the command line, and calls a script's `main` with what it says.

    An error of ours is one line on stderr and exit status 2; with the flag `--debug` its traceback comes before. What
    other packages say beside errors is not shown, unless `--debug` or TrainingArguments' `--log_level` asks for it.

    Args:
        main: takes an instance of each type.
        *types: as in `parse_arguments`.
        defaults: as in `parse_arguments`.
        flags: the command line; by default that of the program.
        program: what it is called; by default the file's name.
        example: a command line, for the help.

    Example:
        >>> if __name__ == "__main__":
        ...     run(main, ScriptArguments, RobustTrainingArguments)
    """
    program = program or Path(sys.argv[0]).name
    flags, debug = _without_debug(sys.argv[1:] if flags is None else flags)
    try:
        arguments = parse_arguments(types, defaults, flags, program, example)
        trainings = [one for one in arguments if isinstance(one, TrainingArguments)]
        if debug or any(map(is_verbose, trainings)):
            talkative()
        else:
            quiet()
        with no_empty_folders([str(one.output_dir) for one in trainings]):
            main(*arguments)
    except HfRobustError as error:
        _fail(error, debug, program)
    except SystemExit:  # a signal has come, and a checkpoint is saved
        _end_processes_if_any()
        raise
    _end_processes_if_any()


def _without_debug(flags: Sequence[str]) -> tuple[list[str], bool]:
    """`--debug` with a value is TrainingArguments' own."""
    following = [*flags[1:], "-"][: len(flags)]
    kept = [flag for flag, after in zip(flags, following, strict=True) if flag != "--debug" or after[:1] != "-"]
    return kept, len(kept) < len(flags)


def _fail(error: HfRobustError, debug: bool, program: str) -> NoReturn:
    rank, several = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", 1)) > 1
    if debug:
        traceback.print_exc()
    where = f" on rank {rank}" if several else ""
    line = f"{program}: error{where}: {' '.join(str(error).split())}"
    tqdm.write(line, file=sys.stderr)  # not into the line of a progress bar
    sys.stdout.flush()
    sys.stderr.flush()
    if several:  # at an ordinary exit it might wait for ranks that wait for it
        os._exit(FAILED)
    sys.exit(FAILED)


def talkative() -> None:
    """Shows what this package has to say beside results: which entries SAFT selected, for one."""
    basicConfig(format="%(message)s")
    getLogger("hf_robust").setLevel(INFO)


def quiet() -> None:
    """Silences warnings, logs and loading bars of other packages; downloads still show how far they are."""
    if not sys.warnoptions:
        for category in (FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()  # the Hub's, which the line before disables too
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()


@contextmanager
def no_empty_folders(folders: Sequence[str]) -> Iterator[None]:
    """Removes folders that were made since and hold nothing, if an error comes.

    Args:
        folders: where results go.

    Example:
        >>> with no_empty_folders(["runs/new"]):
        ...     trainer = RobustTrainer(model, RobustTrainingArguments("runs/new"))
    """
    new = [folder for folder in folders if not Path(folder).exists()]
    try:
        yield
    except BaseException:
        for folder in new:
            with suppress(OSError):
                os.rmdir(folder)
        raise


def _end_processes_if_any() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        end_processes()


def end_processes() -> None:
    """Ends the group of processes; for after a script's `main`, when nothing of its training is left.

    A model in DDP that outlives the group may wait for the group's threads for ever: pytorch/pytorch#56297.
    """
    gc.collect()
    PartialState().destroy_process_group()
