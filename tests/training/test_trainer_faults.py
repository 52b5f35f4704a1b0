# SPDX-License-Identifier: Apache-2.0
"""A fault at any call by which a checkpoint is saved costs no more than the steps since the one before.

`make test-long` runs every call; else some of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from torch.distributed import TCPStore

from tests.programs import ROOT
from tests.training.faults import KILLED, NEVER, REFUSED, RUNS

LONG = os.environ.get("HF_ROBUST_LONG") == "1"
LAST = 2  # calls: the rename and what follows
SPREAD = 2  # more of them
CASES = [(name, KILLED) for name in RUNS] + [("saft", "ENOSPC"), ("full", "EIO")]
if LONG:
    CASES = [(name, fault) for name in RUNS for fault in (KILLED, "ENOSPC", "EIO")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two programs that fork a training for each order, and the folder that they work in."""
    folder = tmp_path_factory.mktemp("faults")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["HF_DATASETS_CACHE"] = str(folder / "datasets")
    command = [sys.executable, "-m", "tests.training.faults", str(folder / "warm")]
    with ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("w"))
        how = {"cwd": ROOT, "env": environment, "stderr": log, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        programs = [stack.enter_context(subprocess.Popen(command, text=True, **how)) for _ in range(2)]
        yield folder, programs
        for program in programs:
            program.stdin.close()


@pytest.fixture
def train(ranks):
    """Trains on one rank or two; returns their exit statuses."""
    folder, programs = ranks

    def run(name, n_ranks=1, fault=None, when=0, rank=0, resume=False):
        order = {"name": name, "folder": str(folder / "run"), "fault": fault, "when": when, "rank": rank}
        order |= {"resume": resume, "result": "result"}
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        common |= {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
        for index, program in enumerate(programs[:n_ranks]):
            own = {"RANK": str(index), "LOCAL_RANK": str(index)}
            order["environment"] = {} if n_ranks == 1 else common | own
            program.stdin.write(json.dumps(order) + "\n")
            program.stdin.flush()
        return [int(program.stdout.readline()) for program in programs[:n_ranks]]

    return run


def equal(first, second):
    """Whether two results are the same to the last bit, down to the states of optimizer and generators."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool((first == second) if not hasattr(first, "shape") else (first == second).all())


def results(folder, n_ranks):
    return [torch.load(folder / "run" / f"result-{rank}.pt", weights_only=False) for rank in range(n_ranks)]


def some(calls):
    """All calls, or the last ones and some of the others."""
    if LONG:
        return range(1, calls + 1)
    return [*(calls * (2 * i + 1) // (2 * SPREAD) for i in range(SPREAD)), *range(calls - LAST + 1, calls + 1)]


def check_fault(folder, train, name, n_ranks, expected, fault, when, rank=0):
    shutil.rmtree(folder / "run", ignore_errors=True)
    statuses = train(name, n_ranks, fault, when, rank)
    left = [path.name for path in (folder / "run").glob(".hf_robust-tmp-*")]
    if fault == KILLED:
        assert statuses[rank] == -signal.SIGKILL and len(left) <= 1
    else:  # or it could be done without: what a card says of the surroundings
        assert statuses in ([REFUSED] * n_ranks, [0] * n_ranks)
        assert not [name for name in left if "old" not in name]  # what was to be removed may have to wait
    if any(statuses):
        assert (folder / "run" / "checkpoint-1").exists() or (folder / "run" / "checkpoint-2").exists()
        assert train(name, n_ranks, resume=True) == [0] * n_ranks
    assert equal(results(folder, n_ranks), expected)
    assert not list((folder / "run").glob(".hf_robust-tmp-*"))


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_a_fault_at_any_call_costs_no_more_than_a_step(ranks, train, name, fault):
    folder, _ = ranks
    shutil.rmtree(folder / "run", ignore_errors=True)
    assert train(name, fault=fault, when=NEVER) == [0]
    expected, calls = results(folder, 1), int((folder / "run" / "calls").read_text())
    assert calls > 50
    for when in some(calls):
        check_fault(folder, train, name, 1, expected, fault, when)


@pytest.mark.parametrize("fault", [KILLED, "ENOSPC"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_on_one_of_two_ranks_stops_both(ranks, train, rank, fault):
    folder, _ = ranks
    shutil.rmtree(folder / "run", ignore_errors=True)
    assert train("saft", 2, fault, NEVER) == [0, 0]
    expected, calls = results(folder, 2), int((folder / "run" / "calls").read_text())
    points = range(1, 4) if rank == 1 else some(calls) if LONG else [calls // 2, calls - 1]
    for when in points if LONG else list(points)[:2]:
        check_fault(folder, train, "saft", 2, expected, fault, when, rank)
