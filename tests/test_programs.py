# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

import pytest

from tests import programs
from tests.programs import run_programs

STUCK = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', 'import time; time.sleep(100)'])"


def test_outputs_are_those_of_each_program():
    commands = [[sys.executable, "-c", f"import sys; print({n}); print(-{n}, file=sys.stderr)"] for n in (1, 2)]
    assert run_programs(*commands) == [("1\n", "-1\n"), ("2\n", "-2\n")]


@pytest.mark.parametrize("other", ["pass", "raise SystemExit('it failed')"])
def test_a_stuck_program_ends_the_test_with_the_stacks_of_all(monkeypatch, other):
    monkeypatch.setattr(programs, "TIME_LIMIT", 5 if other == "pass" else 100)
    with pytest.raises(AssertionError) as caught:
        run_programs([sys.executable, "-c", STUCK], [sys.executable, "-c", other])
    message = str(caught.value)
    assert "subprocess.py" in message and 'File "<string>", line 1 in <module>' in message
    assert message.count("Fatal Python error: Aborted") == 2 and ("it failed" in message) == (other != "pass")
