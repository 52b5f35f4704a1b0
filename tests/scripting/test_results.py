# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from hf_robust.scripting.results import package_versions, percent
from hf_robust.scripting.timing import interleaved_medians, print_medians


def test_figures_are_in_percent():
    assert percent(0.125) == percent(0.125, [0.125]) == "12.5" and percent(0.5, [0.4, 0.6]) == "50.0 ± 14.1"


def test_versions_are_those_installed():
    assert package_versions()["torch"] == torch.__version__


def test_steps_take_turns(capsys):
    called = []
    steps = {name: (lambda name=name: called.append(name)) for name in "ab"}
    medians = interleaved_medians(steps, rounds=2)
    assert called == ["a", "b"] * 3 and medians.keys() == {"a", "b"}
    print_medians("steps", {"a": 1.0, "b": 1.5}, "a", {"waits": {"a": 0, "b": 2}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    head = ["steps", "seconds", "x", "a", "waits"]
    assert lines == [[], head, ["a", "1.0000", "1.000", "0"], ["b", "1.5000", "1.500", "2"]]
