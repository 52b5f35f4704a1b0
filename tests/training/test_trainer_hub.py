# SPDX-License-Identifier: Apache-2.0
"""The cards that RobustTrainer writes, and its pushes."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from hf_robust import model_card
from hf_robust.errors import ConfigError, HubError
from tests.tiny_models import image_dataset
from tests.trainers import METHODS, NAMES, OTHER_NAMES, build

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's uploads
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # PEFT's own LN tuning
]
REPO = "alice/clip-saft"


def sets():
    drawings = {name: image_dataset(7, NAMES, seed=seed) for name, seed in (("id", 50), ("sketch", 60))}
    return {"validation": image_dataset(7, NAMES, seed=70), **drawings, "pets": image_dataset(9, OTHER_NAMES, seed=90)}


@pytest.mark.parametrize("method", METHODS)
def test_saved_model_and_checkpoints_have_a_card(tmp_path, method):
    trained = build(tmp_path, method, max_steps=2, save_strategy="steps", save_steps=2)
    trained.train()
    trained.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == ("transformers" if method == "full" else "peft")
        assert "hf-robust" in card.data.tags and str(tmp_path) not in card.content
        assert "red" in card.text and card.data.eval_results is None


def test_a_training_set_without_length_is_no_hindrance(tmp_path):
    stream = image_dataset(18, NAMES).to_iterable_dataset()
    trained = build(tmp_path, "full", train_dataset=stream, class_names=NAMES, max_steps=1)
    trained.train()
    trained.save_model()
    assert "Training images" not in (tmp_path / "README.md").read_text()
    with pytest.raises(ConfigError, match="Selecting entries.*without length.*LabelledStream"):
        build(tmp_path, "saft", train_dataset=stream, class_names=NAMES, max_steps=1).train()


def test_card_shows_what_the_sweep_found(tmp_path):
    trained = build(tmp_path, "saft", eval_dataset=sets())
    trained.train()
    sweep = trained.wise_ft_sweep(alphas=[0.0, 0.5, 1.0])
    trained.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    shown = {result.dataset_name for result in card.data.eval_results}
    assert {"id", "sketch"} <= shown and "validation" not in shown
    zero_shot = sweep.rows[0]["sketch_accuracy"]
    assert f"{100 * zero_shot:.1f}" in card.text and "WiSE-FT" in card.text
    assert "](wise_ft.png)" in card.text
    assert (tmp_path / "wise_ft.png").read_bytes().startswith(b"\x89PNG")
    curve = [{"alpha": row["alpha"], "id": row["id_accuracy"], "ood": row["sketch_accuracy"]} for row in sweep.rows]
    assert trained.card_results().curve == curve
    roles = {one.name: one.role for one in trained.card_results().sets}
    assert roles == {"id": "id", "sketch": "ood", "pets": "other"}
    trained.train()  # the sweep is of the model before
    assert trained.card_results() is None


def test_a_card_of_ones_own_is_kept(tmp_path):
    trained = build(tmp_path, "saft", max_steps=1)
    trained.train()
    trained.create_model_card(model_card(trained.model, data="Drawings by my sister."))
    assert "Drawings by my sister" in (tmp_path / "README.md").read_text()
    trained.save_model()
    assert "Drawings by my sister" in (tmp_path / "README.md").read_text()


def test_push_sends_adapter_and_card_in_one_commit(tmp_path, hub):
    trained = build(tmp_path, "saft", max_steps=1, save_strategy="steps", save_steps=1, hub_model_id=REPO)
    trained.train()
    trained.push_to_hub()
    assert hub.commits(REPO) == 1
    files = hub.files(REPO)
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "classifier.json"} <= set(files)
    assert not any("training_args" in name or "checkpoint" in name for name in files)
    assert not any(str(tmp_path).encode() in content for content in files.values())


def test_the_curve_is_pushed_with_the_card(tmp_path, hub):
    trained = build(tmp_path, "saft", max_steps=1, hub_model_id=REPO, eval_dataset=sets())
    trained.train()
    trained.wise_ft_sweep(alphas=[0.0, 1.0])
    trained.push_to_hub()
    assert hub.files(REPO)["wise_ft.png"] == (tmp_path / "wise_ft.png").read_bytes()


def test_without_ood_sets_there_is_no_curve(tmp_path):
    names = {name: one for name, one in sets().items() if name != "sketch"}
    trained = build(tmp_path, "saft", max_steps=1, eval_dataset=names)
    trained.train()
    trained.wise_ft_sweep(alphas=[0.0, 1.0])
    trained.save_model()
    assert "wise_ft.png" not in (tmp_path / "README.md").read_text() and not (tmp_path / "wise_ft.png").exists()


def test_failed_push_leaves_a_whole_copy_and_no_commit(tmp_path, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    trained = build(tmp_path, "saft", max_steps=1, hub_model_id=REPO)
    trained.train()
    with pytest.raises(HubError, match="token"):
        trained.push_to_hub()
    assert hub.commits(REPO) == 0
    assert (tmp_path / "adapter_model.safetensors").exists() and (tmp_path / "README.md").exists()


def test_training_itself_pushes_nothing(tmp_path, hub):
    settings = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": "every_save"}
    build(tmp_path, "saft", max_steps=2, save_strategy="steps", save_steps=1, **settings).train()
    assert hub.commits(REPO) == 0
