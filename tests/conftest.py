# SPDX-License-Identifier: Apache-2.0
import gc
import logging
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports huggingface_hub

import datasets
from transformers.utils import logging as transformers_logging

from .fake_hub import hub as hub
from .methods import METHODS, Method

# The same examples in every run, and as much time as a busy machine takes for them
settings.register_profile("tests", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """What is imported by now stays: each training collects garbage, and need not look through all of that."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(autouse=True)
def voices_of_other_packages() -> Iterator[None]:
    """What a script silences is heard again in the next test."""
    levels = datasets.logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = not datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    level = logging.getLogger("hf_robust").level
    yield
    datasets.logging.set_verbosity(levels[0])
    transformers_logging.set_verbosity(levels[1])
    (datasets.enable_progress_bars if bars[0] else datasets.disable_progress_bars)()
    (transformers_logging.enable_progress_bar if bars[1] else transformers_logging.disable_progress_bar)()
    logging.getLogger("hf_robust").setLevel(level)


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param
