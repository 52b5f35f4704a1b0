# SPDX-License-Identifier: Apache-2.0
"""What RobustTrainer saves of an adapter loads by itself, with the base that it names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from peft import AutoPeftModel
from transformers import AutoModel, AutoProcessor

from hf_robust.cards.push import push
from hf_robust.scripting.loading import load_processor
from tests.methods import all_families, outputs
from tests.tiny_models import tiny_model, tiny_processor
from tests.trainers import build

methods = pytest.mark.parametrize("method", ["saft", "aclip", "lora"])
REPO, BASE = "alice/clip-saft", "alice/clip"


def trained(tmp_path: Path, method: str, family: str = "clip"):
    """A trainer whose base was loaded from the folder `base`, with a checkpoint and the final model in `run`."""
    tiny_model(family).save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base")
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = build(tmp_path / "run", method, family, model=model, **settings)
    trainer.train()
    trainer.save_model()
    return trainer


def assert_same_processor(found, expected) -> None:
    assert type(found) is type(expected) and found.tokenizer("a cat") == expected.tokenizer("a cat")
    assert found.image_processor.to_dict() == expected.image_processor.to_dict()


@methods
@all_families
def test_auto_peft_model_loads_what_was_saved(tmp_path, family, method):
    trainer = trained(tmp_path, method, family)
    expected = outputs(trainer.model.model.eval(), family)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "base")
        assert torch.equal(outputs(AutoPeftModel.from_pretrained(folder).eval(), family), expected)
        assert_same_processor(AutoProcessor.from_pretrained(folder, subfolder="processor"), tiny_processor(family))
        assert_same_processor(load_processor(str(folder)), tiny_processor(family))


@methods
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's uploads
def test_auto_peft_model_loads_what_was_pushed(tmp_path, hub, method):
    trainer = trained(tmp_path, method)
    trainer.model.model.peft_config["default"].revision = "v1"
    trainer.save_model()
    push(tmp_path / "base", BASE, revision="v1")
    tiny_model("clip", seed=1).save_pretrained(tmp_path / "base")  # the base has gone on since
    tiny_processor("clip").save_pretrained(tmp_path / "base")
    push(tmp_path / "base", BASE)
    push(tmp_path / "run", REPO, base_model_id=BASE)
    expected = outputs(trainer.model.model.eval())
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "run")
    assert torch.equal(outputs(AutoPeftModel.from_pretrained(REPO).eval()), expected)
    assert torch.equal(outputs(AutoPeftModel.from_pretrained(snapshot_download(REPO)).eval()), expected)
    assert_same_processor(AutoProcessor.from_pretrained(REPO, subfolder="processor"), tiny_processor("clip"))
    for name in (REPO, BASE):
        assert_same_processor(load_processor(name), tiny_processor("clip"))


@all_families
def test_a_whole_model_has_its_processor_beside_it(tmp_path, family):
    build(tmp_path, "full", family).save_model()
    assert_same_processor(AutoProcessor.from_pretrained(tmp_path), tiny_processor(family))
    assert_same_processor(load_processor(str(tmp_path)), tiny_processor(family))
    assert not (tmp_path / "processor").exists()


def test_a_processor_beside_an_adapter_is_read_where_there_is_no_other(tmp_path):
    """As early versions wrote it."""
    trained(tmp_path, "lora")
    run = tmp_path / "run"
    for file in (run / "processor").iterdir():
        file.rename(run / file.name)
    (run / "processor").rmdir()
    assert_same_processor(load_processor(str(run)), tiny_processor("clip"))
