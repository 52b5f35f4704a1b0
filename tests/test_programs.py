# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import multiprocessing
import os
import sys
from itertools import chain, repeat
from time import sleep
from types import SimpleNamespace

import pytest

from tests import programs
from tests.programs import ROOT, run_on_ranks, run_programs

STUCK = """
import subprocess, sys
child = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(1000)"
subprocess.run([sys.executable, "-c", child, sys.argv[1]])
"""
FAILS = """
import os, sys, time
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
sys.exit("it failed")
"""


def test_outputs_are_those_of_each_program():
    commands = [[sys.executable, "-c", f"import sys; print({n}); print(-{n}, file=sys.stderr)"] for n in (1, 2)]
    assert run_programs(*commands) == [("1\n", "-1\n"), ("2\n", "-2\n")]


@pytest.mark.parametrize("other", ["pass", FAILS], ids=["other passes", "other fails"])
def test_a_stuck_program_ends_the_test_with_the_stacks_of_all(monkeypatch, tmp_path, other):
    """Time goes by, or the other fails, once the stuck program's child is there."""
    ready, readings = tmp_path / "ready", chain([0.0], repeat(programs.TIME_LIMIT + 1))
    if other == "pass":
        clock = SimpleNamespace(monotonic=lambda: next(readings) if ready.exists() else 0.0, sleep=sleep)
        monkeypatch.setattr(programs, "time", clock)
    with pytest.raises(AssertionError) as caught:
        run_programs(*([sys.executable, "-c", code, str(ready)] for code in (STUCK, other)))
    message = str(caught.value)
    assert "subprocess.py" in message and 'File "<string>", line 1 in <module>' in message
    assert message.count("Fatal Python error: Aborted") == 2 and ("it failed" in message) == (other != "pass")


RANK = """
import sys
loaded = "hf_robust.training.trainer" in sys.modules
import json, multiprocessing, os, random, warnings
import datasets, numpy, torch

def main(folder):
    torch.distributed.init_process_group("gloo")
    os.system("echo by a child")
    found = {"loaded": loaded, "argv": sys.argv, "cwd": os.getcwd(), "variable": os.environ["SET_BY_TEST"]}
    found |= {"threads": torch.get_num_threads(), "cache": str(datasets.config.HF_DATASETS_CACHE)}
    found |= {"ranks": [torch.distributed.get_rank(), int(os.environ["LOCAL_RANK"])]}
    found["start"] = multiprocessing.get_start_method()
    print(json.dumps({**found, "drawn": [random.random(), numpy.random.rand()]}))
    warnings.warn("as a script's", DeprecationWarning)
"""
FAILING = """
import os, sys, time

def main(folder):
    ready = f"{folder}/ready"
    if os.environ["RANK"] == "0":
        open(ready, "w").close()
        time.sleep(1000)
    while not os.path.exists(ready):
        time.sleep(0.01)
    ENDS
"""


def test_ranks_are_as_programs_of_their_own_that_have_imported_everything(monkeypatch, tmp_path):
    monkeypatch.setenv("SET_BY_TEST", "yes")
    expected = {"loaded": True, "argv": [str(tmp_path / "script.py"), str(tmp_path)], "cwd": str(ROOT)}
    expected |= {"variable": "yes", "threads": 1, "cache": str(tmp_path / "datasets")}
    expected["start"] = multiprocessing.get_start_method()
    drawn = []
    for rank, (out, err) in enumerate(run_on_ranks(2, RANK, tmp_path)):
        (found,) = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
        drawn += found.pop("drawn")
        assert found == {**expected, "ranks": [rank, rank]} and "by a child" in out.splitlines()
        assert err.count("DeprecationWarning: as a script's") == 1
    assert len(set(drawn)) == 4 and os.environ.get("RANK") is None


@pytest.mark.parametrize(
    ("ends", "status", "text"),
    [
        ("sys.exit('it failed')", 1, "it failed"),
        ("raise OSError('it failed')", 1, "OSError: it failed"),
        ("os._exit(7)", 7, ""),
        ("os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_a_rank_that_fails_ends_the_test_with_the_stacks_of_the_others(tmp_path, ends, status, text):
    with pytest.raises(AssertionError, match=rf"exit statuses \[-6, {status}\] of") as caught:
        run_on_ranks(2, FAILING.replace("ENDS", ends), tmp_path)
    message = str(caught.value)
    assert f'{tmp_path}/script.py", line 8 in main' in message and text in message
    assert message.count("Fatal Python error: Aborted") == 1
