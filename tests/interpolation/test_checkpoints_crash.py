# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_robust.interpolation.checkpoints import interpolate_checkpoints
from tests.interpolation.folders import content, pair, save

CALLS = {"write", "fsync", "rename", "rmdir", "unlink", "mkdir", "sendfile", "_exchange"}
CHILD = f"""
import os, signal, sys
from hf_robust.interpolation.checkpoints import interpolate_checkpoints

def run(when, alpha, overwrite):
    seen = 0
    def count(frame, event, argument):
        nonlocal seen
        name = argument.__name__ if event == "c_call" else frame.f_code.co_name if event == "call" else ""
        if name in {CALLS!r}:
            seen += 1
            if seen == when:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(count)
    interpolate_checkpoints("a", "b", "parent/out", alpha, overwrite=overwrite)

for line in sys.stdin:  # forks, since the imports take longer than all else
    when, alpha, overwrite = eval(line)
    child = os.fork()
    if child == 0:
        run(when, alpha, overwrite)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    for name, tensors, shards in zip(("a", "b", "old"), (*pair(), pair(seed=7)[0]), (1, 2, 3), strict=True):
        save(folder / name, tensors, shards)
    return folder


@pytest.fixture(scope="module")
def merge(folder):
    """Merges in a process that is killed at its `when`th call that could change a file; returns whether it was."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CHILD]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes) as process:

        def run(*arguments):
            process.stdin.write(f"{arguments!r}\n")
            process.stdin.flush()
            status = int(process.stdout.readline())
            assert status in (0, signal.SIGKILL)
            return status == signal.SIGKILL

        yield run
        process.stdin.close()


@pytest.mark.parametrize("alpha, overwrite", [(0.25, False), (0.25, True), (1, True)])
def test_killed_at_any_call_leaves_the_old_or_the_whole_new_output(folder, merge, tmp_path, alpha, overwrite):
    interpolate_checkpoints(folder / "a", folder / "b", tmp_path / "out", alpha)
    parent, new, outcomes = folder / "parent", content(tmp_path / "out"), []
    old = content(folder / "old") if overwrite else {}
    for when in range(1, 500):
        shutil.rmtree(parent, ignore_errors=True)
        parent.mkdir()
        if overwrite:
            shutil.copytree(folder / "old", parent / "out")
        killed = merge(when, alpha, overwrite)
        outcomes.append(content(parent / "out"))
        assert outcomes[-1] in (old, new)
        check_temporary([path for path in parent.iterdir() if path.name != "out"], old, new, outcomes[-1])
        if not killed:
            break
    assert len(outcomes) > 20 and outcomes[0] == old and outcomes[-1] == new
    assert os.listdir(parent) == ["out"]


def check_temporary(folders, old, new, output):
    """At most one is left: the old output being deleted, or the new one, which no one can load before it is whole."""
    assert len(folders) <= 1
    for folder in folders:
        assert folder.name.startswith(".hf_robust-tmp-")
        files = content(folder)
        if output == new:
            assert files.items() <= old.items()
        elif "config.json" in files:
            del files["config.json"]
            assert files.items() == new.items() - {("config.json", new["config.json"])}
