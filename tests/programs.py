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
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 900.0  # seconds: only what is stuck takes as long, on a busy machine too
ABORT_LIMIT = 60.0

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


def run_on_ranks(ranks: int, script: str, folder: Path) -> list[tuple[str, str]]:
    """Runs a script on several ranks, as `accelerate launch` does; returns what each wrote to stdout and to stderr.

    The ranks meet at a store that listens here before they start: no one else can take its port meanwhile.

    Args:
        ranks: how many.
        script: Python code that defines `main(folder)`, which leaves a process group behind.
        folder: the cache of datasets is put there.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (folder / "script.py").write_text(script + SCRIPT_END)
    command = [sys.executable, str(folder / "script.py"), str(folder)]
    common = {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / "datasets"), "WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "LOCAL_WORLD_SIZE": str(ranks)}
    common["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # else rank 0 opens another
    of_each = [["env", f"RANK={rank}", f"LOCAL_RANK={rank}", *command] for rank in range(ranks)]
    return run_programs(*of_each, **common)


def _wait(processes: list[psutil.Popen]) -> None:
    end = time.monotonic() + TIME_LIMIT
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > end:
            return _abort(processes)
        time.sleep(0.05)


def _abort(processes: list[psutil.Popen]) -> None:
    """Python's fault handler answers this signal with the stacks of all threads.

    One process after the other, since those of one program write to one file; meanwhile the others stand still, since
    they would go on, or fail, as soon as one that they wait for has ended.
    """
    running = [process for process in processes if process.poll() is None]
    _signal(running, signal.SIGSTOP)
    started = [child for process in running for child in process.children(recursive=True)]
    _signal(started, signal.SIGSTOP)
    for process in started + running:
        _signal([process], signal.SIGABRT, signal.SIGCONT)
        _wait_for_end(process)
    for process in running:
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
