# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


@pytest.fixture(autouse=True)
def deterministic() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
