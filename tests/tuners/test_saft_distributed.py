# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_two_ranks_select_and_train_as_one(free_port: int) -> None:
    """Same entries from uneven shares, bit-identical ranks, DDP and FSDP equal to one process."""
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port}"]
    done = subprocess.run(
        [*launch, "-m", "tests.tuners.two_ranks"], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "two ranks agree" in done.stdout
