# SPDX-License-Identifier: Apache-2.0
"""How long `import hf_robust` takes, compared with the packages it is made for.

    python examples/benchmarks/import_time.py --rounds 9

User time of fresh processes, taking turns; `packages` are peft, transformers and datasets. What a training or a
picture needs beyond them is loaded when it is used.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

from hf_robust.scripting.run import run
from hf_robust.scripting.timing import interleaved_medians, print_medians

STATEMENTS = {
    "packages": "import peft, transformers, datasets",
    "hf_robust": "import hf_robust",
    "RobustTrainer": "from hf_robust import RobustTrainer",
    "evaluate_suite": "from hf_robust.evaluation import evaluate_suite",
}


def user_seconds() -> float:
    """User time of all child processes that have ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def execute(statement: str) -> None:
    """Runs a statement in a Python of its own."""
    subprocess.run([sys.executable, "-c", statement], check=True)


@dataclass
class ScriptArguments:
    """How long importing hf_robust takes."""

    rounds: int = 9


def main(arguments: ScriptArguments) -> None:
    """Times the imports."""
    steps = {name: partial(execute, statement) for name, statement in STATEMENTS.items()}
    print_medians("user time", interleaved_medians(steps, arguments.rounds, user_seconds), "packages")


if __name__ == "__main__":
    run(main, ScriptArguments)
