# SPDX-License-Identifier: Apache-2.0
"""Programs in processes of their own, one or several at a time."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import set_forkserver_preload
from pathlib import Path
from typing import IO
from unittest.mock import patch

import datasets
import numpy as np
import psutil
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 900.0  # seconds: only what is stuck takes as long, on a busy machine too
ABORT_LIMIT = 60.0
VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
FORKED = {**VARIABLES, "PYTHONPATH": str(ROOT)}

# A model in DDP that outlives its process group may wait for the group's threads for ever (pytorch issue 56297).
SCRIPT_END = """
import gc
import sys
import torch

main(sys.argv[1])
gc.collect()
torch.distributed.destroy_process_group()
"""


def run_programs(*commands: list[str], cwd: Path = ROOT, **environment: str) -> list[tuple[str, str]]:
    """Runs programs at the same time; returns what each wrote to stdout and to stderr.

    When one fails, or has not ended in time, all are stopped and the test fails; their stderr then ends with where in
    Python each process was, those that the programs started too.

    Args:
        commands: of each program.
        cwd: where they are started.
        environment: variables to set.
    """
    variables = {**os.environ, **VARIABLES, **environment}
    return _outputs([partial(psutil.Popen, command, cwd=cwd, env=variables) for command in commands])


def run_on_ranks(ranks: int, script: str, folder: Path) -> list[tuple[str, str]]:
    """Runs a script on several ranks, as `accelerate launch` does; returns what each wrote to stdout and to stderr.

    The ranks meet at a store that listens here before they start: no one else can take its port meanwhile.

    Args:
        ranks: how many.
        script: Python code that defines `main(folder)`, which leaves a process group behind.
        folder: the cache of datasets is put there.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [str(folder / "script.py"), str(folder)]
    Path(command[0]).write_text(script + SCRIPT_END)
    common = {**os.environ, **FORKED, "HF_DATASETS_CACHE": str(folder / "datasets"), "WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "LOCAL_WORLD_SIZE": str(ranks)}
    common["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # else rank 0 opens another
    of_each = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return _outputs([partial(_Forked, command, own) for own in of_each])


class _Forked(ForkServerProcess):
    """A script in a process forked from one that has imported what scripts import, which takes longer than most run.

    Ranks have in common what a start of Python settles: the seed of hashes, and variables read when modules are
    imported. At its end Python is not finalized: a test of that needs a program of its own.
    """

    def __init__(self, args: list[str], variables: dict[str, str], stdout: IO[str], stderr: IO[str]) -> None:
        super().__init__()
        self.args, self.variables, self.files = args, variables, [stdout.name, stderr.name]
        set_forkserver_preload(["tests.trainers", "tests.programs"])
        with patch.dict(os.environ, FORKED):  # the first starts the server
            self.start()

    def run(self) -> None:
        gc.freeze()  # as in conftest.py
        for name, stream in zip(self.files, (sys.stdout, sys.stderr), strict=True):
            os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), stream.fileno())
        os.environ.clear()
        os.environ.update(self.variables)
        os.chdir(ROOT)
        importlib.reload(datasets.config)  # it reads the variables when it is imported
        multiprocessing.set_start_method(None, force=True)  # as of a program: the server is not for what a rank starts
        np.random.seed()  # else all ranks would draw the same
        sys.argv = self.args
        runpy.run_path(self.args[0], run_name="__main__")

    def poll(self) -> int | None:
        return self.exitcode

    returncode = property(poll)
    wait = ForkServerProcess.join


def _outputs(starts: list[Callable[..., psutil.Popen | _Forked]]) -> list[tuple[str, str]]:
    with ExitStack() as stack:
        files = [[stack.enter_context(tempfile.NamedTemporaryFile("w+")) for _ in range(2)] for _ in starts]
        processes = [start(stdout=out, stderr=err) for start, (out, err) in zip(starts, files, strict=True)]
        _wait(processes)
        outputs = [(_written(out), _written(err)) for out, err in files]
    codes = [process.returncode for process in processes]
    errors = "\n\n".join(err[-20000:] for _, err in outputs)
    assert not any(codes), f"exit statuses {codes} of {[process.args for process in processes]}\n{errors}"
    return outputs


def _wait(processes: list[psutil.Popen | _Forked]) -> None:
    end = time.monotonic() + TIME_LIMIT
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > end:
            return _abort(processes)
        time.sleep(0.05)


def _abort(processes: list[psutil.Popen | _Forked]) -> None:
    """Python's fault handler answers this signal with the stacks of all threads.

    One process after the other, since those of one program write to one file; meanwhile the others stand still, since
    they would go on, or fail, as soon as one that they wait for has ended.
    """
    running = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            running += [psutil.Process(process.pid)] if process.poll() is None else []
    _signal(running, signal.SIGSTOP)
    started = [child for process in running for child in process.children(recursive=True)]
    _signal(started, signal.SIGSTOP)
    for process in started + running:
        _signal([process], signal.SIGABRT, signal.SIGCONT)
        _wait_for_end(process)
    for process in processes:
        process.wait()


def _signal(processes: list[psutil.Process], *signals: signal.Signals) -> None:
    for process in processes:
        for one in signals:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(one)


def _wait_for_end(process: psutil.Process) -> None:
    end = time.monotonic() + ABORT_LIMIT
    with suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:  # as the child of a parent that stands still
            if time.monotonic() > end:
                process.kill()
            time.sleep(0.01)


def _written(file) -> str:
    file.seek(0)
    return file.read()
