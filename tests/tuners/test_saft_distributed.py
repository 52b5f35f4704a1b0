# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

from tests.programs import run_on_ranks


def test_two_ranks_select_and_train_as_one(tmp_path: Path) -> None:
    """Same entries from uneven shares, bit-identical ranks, DDP and FSDP2 equal to one process; FSDP1 refused."""
    outputs = run_on_ranks(2, "from tests.tuners.two_ranks import main\n", tmp_path)
    assert all("two ranks agree" in printed for printed, _ in outputs)
