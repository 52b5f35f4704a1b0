# SPDX-License-Identifier: Apache-2.0
"""FSDP2 through RobustTrainer: two ranks against one process."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from hf_robust.errors import CheckpointError, ConfigError
from hf_robust.ogen import OGENConfig, OGENLoss
from hf_robust.training.losses import check_sharded
from hf_robust.training.unsupported import UNSUPPORTED_SHARDING, check_sharding
from tests.programs import run_on_ranks
from tests.trainers import build, same
from tests.training.sharded import RUNS, metrics, outcome, trainer

EXACT = {"rel": 1e-5, "abs": 1e-9}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(2, "from tests.training.sharded import main\n", folder)
    return folder, [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def assert_equal(found: dict[str, Any], one: dict[str, Any]) -> None:
    assert same(found["entries"], one["entries"])
    assert found["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-9, msg=name)
    for step, expected in zip(found["logged"], one["logged"], strict=True):
        assert step == pytest.approx(expected, **EXACT)
    assert found.get("error", "").split(" (at")[0] == one.get("error", "").split(" (at")[0]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "sixteen bits"])
def test_two_ranks_equal_one_process(ranks, tmp_path, name):
    """Gradients of 0-dim parameters are averaged too; the head, the losses, accumulation, recomputation, errors."""
    folder, (first, second) = ranks
    assert same(first[name]["weights"], second[name]["weights"])
    assert first[name]["unsharded"] == ([()] if name in ("clip full", "both full") else [])  # the scale
    one = trainer(tmp_path, name, 1)
    expected = metrics(one) if name == "clip aclip" else None
    assert_equal(first[name], outcome(one))
    if expected is not None:  # before and after
        assert first["zero-shot"] == second["zero-shot"] == pytest.approx(expected, **EXACT)
        assert first["evaluated"] == pytest.approx(metrics(one), **EXACT)
        assert [row["id_loss"] for row in first["alphas"]] == pytest.approx(
            [first["zero-shot"]["eval_id_loss"], first["evaluated"]["eval_id_loss"]], **EXACT
        )
    for saved in tmp_path.rglob("*"):  # the same files
        if saved.name != "rng_state.pth":
            assert (folder / saved.relative_to(tmp_path)).exists(), saved
    if f"{name} resumed" in first:
        assert same(first[f"{name} resumed"]["weights"], first[name]["weights"])
        assert first[f"{name} resumed"]["logged"] == first[name]["logged"]
        one = trainer(tmp_path, name, 1)
        with pytest.raises(CheckpointError, match="another run.*ranks was 2, is 1"):
            one.train(str(folder / name / "checkpoint-2"))
        one.args.allow_changed = ["per_device_train_batch_size", "fsdp", "fsdp_config", "ranks"]
        assert_equal(first[name], outcome(one, resume_from_checkpoint=str(folder / name / "checkpoint-2")))


def test_sixteen_bits_are_those_of_one_process(ranks, tmp_path):
    """Weights that FSDP casts itself would round the head and the layer norms too."""
    _, (first, _) = ranks
    one = trainer(tmp_path, "sixteen bits", 1)
    assert first["sixteen bits"]["logged"][0][0] == pytest.approx(outcome(one)["logged"][0][0], rel=1e-6)
    assert first["sixteen bits"]["logged"][0][0] != pytest.approx(first["clip full"]["logged"][0][0], rel=1e-4)


REFUSED = {
    "fsdp_version": {"fsdp_version": 1},
    "state_dict_type": {"state_dict_type": "SHARDED_STATE_DICT"},
    "cpu_ram_efficient_loading": {"cpu_ram_efficient_loading": True},
    "cpu_offload": {"cpu_offload": True},
    "auto_wrap_policy": {"auto_wrap_policy": "SIZE_BASED_WRAP"},
    "transformer_cls_names_to_wrap": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_cls_names_to_wrap": ["CLIPEncoderLayer"],
    },
    "ignored_modules": {"ignored_modules": "vision_model.*"},
}


def plugin_of(monkeypatch, **settings):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin sets it
    return FullyShardedDataParallelPlugin(
        **{"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False, **settings}
    )


def check(plugin, classifier=None, optimizers=(None, None), mixed_precision="no"):
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=mixed_precision)
    check_sharding(accelerator, classifier, optimizers)


@pytest.mark.parametrize("attribute", UNSUPPORTED_SHARDING)
def test_settings_of_fsdp_are_refused_with_the_reason(monkeypatch, attribute):
    option, _, reason, remedy = UNSUPPORTED_SHARDING[attribute]
    with pytest.raises(ConfigError) as caught:
        check(plugin_of(monkeypatch, **REFUSED[attribute]))
    assert all(part in str(caught.value) for part in (reason, f"(at {option})", remedy))


@pytest.mark.parametrize("policy", ["TRANSFORMER_BASED_WRAP", "NO_WRAP"])
def test_what_is_left_is_served_but_not_with_everything(monkeypatch, policy):
    plugin = plugin_of(monkeypatch, auto_wrap_policy=policy)
    check(plugin)
    with pytest.raises(ConfigError, match=r"optimizers.*optimizer_cls_and_kwargs"):
        check(plugin, optimizers=(object(), None))
    with pytest.raises(ConfigError, match=r"fp16.*bf16=True"):
        check(plugin, mixed_precision="fp16")
    task = SimpleNamespace(terms={"ogen": OGENLoss(OGENConfig(["cat", "dog", "owl"]))})
    with pytest.raises(ConfigError, match=r"whole weights.*losses, ogen.*DDP"):
        check_sharded(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), task)


@pytest.mark.parametrize("asked", [True, False])
def test_fsdp_that_is_not_used_is_said(tmp_path, monkeypatch, caplog, asked):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(asked).lower())
    with caplog.at_level(logging.WARNING, "hf_robust"):
        build(tmp_path)
    assert ("FSDP is not used" in caplog.text) == asked
