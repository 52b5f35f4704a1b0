# SPDX-License-Identifier: Apache-2.0
"""The cards of merges and soups that the command writes."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModel, AutoProcessor

from hf_robust.cards.merged import merged_card
from hf_robust.cli import main
from hf_robust.errors import DataError
from tests.cards.test_card import run_snippet, section
from tests.tiny_models import tiny_model, tiny_processor
from tests.trainers import NAMES, build

BASE = "openai/clip-vit-base-patch32"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with `base`, a whole fine-tuned model `full`, and an adapter `adapter`."""
    monkeypatch.chdir(tmp_path)
    tiny_model("clip").save_pretrained("base")
    tiny_processor("clip").save_pretrained("base")
    for method in ("full", "saft"):
        trainer = build(method, method, model=AutoModel.from_pretrained("base"), max_steps=1)
        trainer.train()
        trainer.save_model()
    return tmp_path


def test_a_merge_of_whole_models(here, monkeypatch):
    main(["merge", "--zero_shot", "base", "--fine_tuned", "full", "--output", "merged", "--alpha", "0.25", "0.5"])
    card = ModelCard.load(here / "merged" / "alpha=0.250" / "README.md")
    assert "α = 0.25." in card.text and "wise-ft" in card.data.tags and "fine-tuning**" not in card.text
    assert card.data.library_name == "transformers" and "base_model" not in card.data.to_dict()
    assert "to classify images of 3 classes" in card.text and "- Classes: red, green, blue" in card.text
    assert "`resample` `3`" in card.text and str(here) not in card.content
    found = run_snippet(card, here / "merged" / "alpha=0.250", None, monkeypatch)
    assert found["classifier"].class_names == NAMES


def test_a_merged_adapter_names_its_method(here):
    main(["merge", "--zero_shot", "base", "--fine_tuned", "saft", "--output", "merged"])
    card = ModelCard.load("merged/README.md")
    assert {"saft", "wise-ft", "clip"} <= set(card.data.tags) and "2407.03036" in card.text and "α = 0.5." in card.text
    assert "the base model is needed" not in card.text and card.text.splitlines()[1] == "# SAFT + WiSE-FT on CLIPModel"


def test_a_soup_of_models(here):
    main(["merge", "--soup", "base", "full", "--output", "soup"])
    card = ModelCard.load("soup/README.md")
    assert "the mean of\n  2 models that were fine-tuned" in card.text and "model-soup" in card.data.tags
    assert "@inproceedings{wortsman2022model" in card.text and "WiSE-FT" not in card.text


def test_a_soup_of_adapters(here, monkeypatch):
    main(["merge", "--zero_shot", "base", "--soup", "saft", "--output", "soup"])
    card = ModelCard.load("soup/README.md")
    assert "1 model that was" in card.text and card.data.library_name == "peft" and "adapter" in card.text
    assert 'base="folder-of-the-base-model"' in section(card, "Use")
    assert {"saft", "model-soup"} <= set(card.data.tags) and "`resample`" in card.text


def test_what_all_began_with_is_named_if_it_is_on_the_hub(here):
    card = merged_card("full", alpha=0.5, base_model_id=BASE, fisher=True)
    assert card.data.base_model == BASE and f"(https://huggingface.co/{BASE})" in card.text
    assert "α = 0.5, weighted by the Fisher information of both." in card.text
    assert yaml.safe_load(str(card).split("---\n")[1])["tags"] == card.data.tags


@pytest.mark.parametrize("kind", ["full", "saft"])
def test_without_class_names_the_encoder_is_loaded(here, kind, monkeypatch):
    (here / kind / "classifier.json").unlink()
    card = merged_card(kind, ingredients=2)
    snippet = section(card, "Use").split("```python\n")[1].split("```")[0]
    folder = repr(str(here / kind))
    names: dict = {}
    exec(snippet.replace('"this-repository"', folder).replace('"folder-of-the-base-model"', "'base'"), names)
    assert isinstance(names["model"], PeftModel) == (kind == "saft") and ("hf_robust" in snippet) == (kind == "saft")
    assert kind == "saft" or type(names["processor"]) is type(AutoProcessor.from_pretrained("base"))
    assert "classify" not in card.text and "Prompts" not in card.text


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="config.json"):
        merged_card(tmp_path, alpha=0.5)
