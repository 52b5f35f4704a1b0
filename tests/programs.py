# SPDX-License-Identifier: Apache-2.0
"""Programs in processes of their own, one or several at a time."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 240.0  # seconds

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
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environment}
    with ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in commands]
        processes = [
            psutil.Popen(command, cwd=cwd, env=variables, stdout=out, stderr=err)
            for command, (out, err) in zip(commands, files, strict=True)
        ]
        _wait(processes)
        outputs = [(_written(out), _written(err)) for out, err in files]
    codes = [process.returncode for process in processes]
    errors = "\n\n".join(err[-20000:] for _, err in outputs)
    assert not any(codes), f"exit statuses {codes} of {commands}\n{errors}"
    return outputs


def run_on_ranks(ranks: int, script: str, folder: Path, port: int) -> list[tuple[str, str]]:
    """Runs a script on several ranks, as `accelerate launch` does; returns what each wrote to stdout and to stderr.

    Args:
        ranks: how many.
        script: Python code that defines `main(folder)`, which leaves a process group behind.
        folder: the cache of datasets is put there.
        port: a free one.
    """
    (folder / "script.py").write_text(script + SCRIPT_END)
    command = [sys.executable, str(folder / "script.py"), str(folder)]
    common = {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / "datasets"), "WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
    of_each = [["env", f"RANK={rank}", f"LOCAL_RANK={rank}", *command] for rank in range(ranks)]
    return run_programs(*of_each, **common)


def _wait(processes: list[psutil.Popen]) -> None:
    end = time.monotonic() + TIME_LIMIT
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > end:
            return _abort(processes)
        time.sleep(0.05)


def _abort(processes: list[psutil.Popen]) -> None:
    """Python's fault handler answers this signal with the stacks of all threads."""
    started = [child for process in processes if process.poll() is None for child in process.children(recursive=True)]
    for process in started + processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGABRT)
    psutil.wait_procs(started + processes, timeout=10)


def _written(file) -> str:
    file.seek(0)
    return file.read()
