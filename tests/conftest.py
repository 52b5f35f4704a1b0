# SPDX-License-Identifier: Apache-2.0
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports huggingface_hub

from .fake_hub import hub as hub
from .methods import METHODS, Method

# The same examples in every run, and as much time as a busy machine takes for them
settings.register_profile("tests", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def deterministic() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """So does what several tests share, whichever of them asks for it first."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from, or left in, the user's own cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param
