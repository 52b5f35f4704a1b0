# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

from tests.programs import run_programs


def test_two_ranks_select_and_train_as_one(free_port: int) -> None:
    """Same entries from uneven shares, bit-identical ranks, DDP and FSDP equal to one process."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}"]
    ((printed, _),) = run_programs([*launch, "-m", "tests.tuners.two_ranks"])
    assert "two ranks agree" in printed
