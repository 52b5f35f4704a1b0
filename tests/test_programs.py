# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from itertools import chain, repeat
from time import sleep
from types import SimpleNamespace

import pytest

from tests import programs
from tests.programs import run_programs

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
