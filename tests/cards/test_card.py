# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import AutoModel

import hf_robust
from hf_robust import (
    AlphaSweep,
    OGENConfig,
    OGENLoss,
    RobustTrainingArguments,
    ZeroShotClassifier,
    context_prompt,
)
from hf_robust.cards.card import ADAPTER_SETTINGS, LOSS_SETTINGS, TRAINING_SETTINGS, model_card
from hf_robust.cards.card import TERMS as TITLES
from hf_robust.cards.markdown import code, escape, hub_id
from hf_robust.cards.results import (
    Accuracy,
    CardResults,
    EvaluationSet,
    points_of,
    results_from_accuracies,
    results_from_reports,
    results_from_sweep,
    role_of,
)
from hf_robust.errors import ConfigError, DataError
from hf_robust.evaluation.report import SetResult, SuiteReport
from hf_robust.evaluation.statistics import bootstrap_interval
from hf_robust.training.losses import TERMS
from tests.tiny_models import FAMILIES, synthetic_picture, tiny_lora, tiny_model, tiny_processor
from tests.trainers import NAMES, build
from tests.training.test_identities_trainer import of as identities
from tests.training.test_pairs_trainer import pairs
from tests.training.test_several_labels_trainer import settings as several

BASE = "openai/clip-vit-base-patch32"
NASTY = [
    "---",
    "<script>alert(1)</script>",
    "a | b",
    "`rm`",
    "x\n---\ny",
    "[l](http://e)",
    "# h",
    "{{ 7*7 }}",
    "{% if %}",
]
HTML = ("<script", "<img", "<b>")


def results(chosen_alpha: float | None = 0.7) -> CardResults:
    def one(name, role, images, zero_shot, tuned, chosen, dataset=None):
        accuracies = {"zero-shot": Accuracy(zero_shot), "fine-tuned": Accuracy(tuned)}
        if chosen_alpha is not None:
            accuracies["chosen alpha"] = Accuracy(chosen, (chosen - 0.02, chosen + 0.03))
        return EvaluationSet(name, role, images, accuracies, dataset)

    sets = [
        one("cifar", "other", 100, 0.9, 0.5, 0.8),
        one("stl", "other", 100, 0.7, 0.6, 0.8),
        one("sketch", "ood", 1500, 0.5, 0.3, 0.6, "songweig/imagenet_sketch"),
        one("renditions", "ood", 100, 0.7, 0.4, 0.7),
        one("photos", "id", 100, 0.4, 0.8, 0.7),
        one("unseen", "new", 100, 0.4, 0.3, 0.4),
    ]
    return CardResults(sets, chosen_alpha)


def classifier(model=None, class_names=NAMES, family="clip", **settings) -> ZeroShotClassifier:
    model = tiny_model(family) if model is None else model
    return ZeroShotClassifier(model, tiny_processor(family), class_names, **settings)


def metadata(card: ModelCard) -> dict:
    """What YAML between the first two rulers says."""
    _, block, _ = str(card).split("---\n", 2)
    return yaml.safe_load(block)


def section(card: ModelCard, title: str) -> str:
    return card.text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


# --- metadata ---


def test_metadata_of_an_adapter() -> None:
    card = model_card(
        classifier(tiny_lora(tiny_model("clip"))),
        results=results(),
        base_model_id=BASE,
        datasets=["me/photos"],
        license="apache-2.0",
    )
    found = metadata(card)
    assert found == card.data.to_dict()
    assert found["library_name"] == "peft" and found["base_model"] == BASE and found["license"] == "apache-2.0"
    assert found["pipeline_tag"] == "zero-shot-image-classification" and found["metrics"] == ["accuracy"]
    assert found["datasets"] == ["me/photos"]
    assert {"hf-robust", "clip", "lora", "wise-ft", f"base_model:adapter:{BASE}"} <= set(found["tags"])


def test_model_index_has_id_and_every_ood_set_at_the_saved_alpha() -> None:
    for chosen_alpha, values in ((0.7, [0.6, 0.7, 0.7]), (None, [0.3, 0.4, 0.8])):
        found = metadata(model_card(classifier(), results=results(chosen_alpha)))["model-index"][0]["results"]
        assert [one["dataset"]["name"] for one in found] == ["sketch", "renditions", "photos"]
        assert [one["dataset"]["type"] for one in found] == ["songweig/imagenet_sketch", "renditions", "photos"]
        assert [one["metrics"][0]["value"] for one in found] == values
        labels = ["accuracy (OOD)", "accuracy (OOD)", "accuracy (ID)"]
        assert [one["metrics"][0]["name"] for one in found] == labels
        assert {one["metrics"][0]["type"] for one in found} == {"accuracy"}


def test_two_sets_of_one_dataset_stay_apart() -> None:
    accuracies = {"fine-tuned": Accuracy(0.5)}
    sets = [EvaluationSet(name, "ood", 10, accuracies, "me/corrupted") for name in ("noise", "blur")]
    found = metadata(model_card(classifier(), results=CardResults(sets)))["model-index"][0]["results"]
    assert [one["dataset"]["name"] for one in found] == ["noise", "blur"]


def test_metadata_of_a_whole_model() -> None:
    found = metadata(model_card(classifier(), base_model_id=BASE))
    assert found["library_name"] == "transformers" and "full-fine-tuning" in found["tags"]
    assert "model-index" not in found and "license" not in found and "datasets" not in found
    assert not any(tag.startswith("base_model:") for tag in found["tags"])


def test_a_base_model_from_a_folder_has_no_name(tmp_path: Path) -> None:
    tiny_model("clip").save_pretrained(tmp_path / "secret-folder")
    model = tiny_lora(AutoModel.from_pretrained(tmp_path / "secret-folder"))
    card = model_card(classifier(model))
    assert "base_model" not in metadata(card) and "secret-folder" not in str(card) and str(tmp_path) not in str(card)
    assert "not on the Hub or was loaded from a local folder" in card.text
    card = model_card(classifier(model), base_model_id=BASE)
    assert metadata(card)["base_model"] == BASE and "local folder" not in card.text


def test_a_base_model_from_the_hub_is_named() -> None:
    model = tiny_model("clip")
    model.config.name_or_path = BASE
    card = model_card(classifier(model))
    assert metadata(card)["base_model"] == BASE and f"https://huggingface.co/{BASE}" in card.text


def test_a_relative_folder_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/full") == "runs/full"
    (tmp_path / "runs" / "full").mkdir(parents=True)
    assert hub_id("runs/full") is None
    assert hub_id("") is None and hub_id("~/clip") is None and hub_id("a/b/c") is None and hub_id("./x") is None


# --- text ---


def test_table_of_results() -> None:
    table = section(model_card(classifier(), results=results()), "What it cost and what it gained")
    assert table.split("\n\n")[-1].strip().splitlines() == [
        "| set |  | images | zero-shot (α = 0) | fine-tuned (α = 1) | chosen (α = 0.7) |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| photos | ID | 100 | 40.0 | 80.0 | 70.0 (68.0–73.0) |",
        "| sketch | OOD | 1,500 | 50.0 | 30.0 | 60.0 (58.0–63.0) |",
        "| renditions | OOD | 100 | 70.0 | 40.0 | 70.0 (68.0–73.0) |",
        "| unseen | new classes | 100 | 40.0 | 30.0 | 40.0 (38.0–43.0) |",
        "| cifar | other task | 100 | 90.0 | 50.0 | 80.0 (78.0–83.0) |",
        "| stl | other task | 100 | 70.0 | 60.0 | 80.0 (78.0–83.0) |",
        "| mean of OOD sets |  |  | 60.0 | 35.0 | 65.0 |",
        "| forgetting |  |  | – | 25.0 | 0.0 |",
    ]


def test_what_was_not_measured_is_a_dash() -> None:
    sets = [
        EvaluationSet("a", "ood", 10, {"fine-tuned": Accuracy(0.5)}),
        EvaluationSet("b", "ood", 10, {"zero-shot": Accuracy(0.5), "fine-tuned": Accuracy(0.7)}),
        EvaluationSet("c", "other", 10, {"fine-tuned": Accuracy(0.5)}),
    ]
    card = model_card(classifier(), results=CardResults(sets))
    assert "| a | OOD | 10 | – | 50.0 |" in card.text and "chosen" not in card.text.split("## Training")[0]
    assert "| mean of OOD sets |  |  | – | 60.0 |" in card.text and "| forgetting |  |  | – | – |" in card.text


def test_every_method_is_explained_and_cited(tmp_path: Path) -> None:
    ids = {
        "SAFT": "2407.03036",
        "A-CLIP": "2402.09613",
        "R-Adapter": "2408.05749",
        "similarity loss": "2409.07582",
        "Lipsum-FT": "2404.00860",
        "CAR-FT": "2211.16175",
        "LDIFS": "2308.13320",
        "L2-SP": "1802.01483",
        "StarFT": "2505.13232",
        "WiSE-FT": "2109.01903",
        "OGEN": "2401.15914",
        "CoOp": "2109.01134",
        "LP-FT": "2202.10054",
    }
    found: dict[str, ModelCard] = {}
    for method in ("full", "saft", "aclip", "radapter", "lora"):
        trainer = build(tmp_path, method, losses={"similarity": {}} if method == "full" else None)
        found[method] = model_card(trainer.model, trainer.args, results(0.5 if method == "full" else None))
    terms = {"lipsum": {"prompts": 9}, "context": {}, "features": {}, "weights": {"weight": 2}, "spuriosity": {}}
    trainer = build(tmp_path, task="flyp", losses=terms)
    found["terms"] = model_card(trainer.model, trainer.args)
    prompted, template = context_prompt(tiny_model("clip"), tiny_processor("clip"), 4, None, NAMES)
    ogen = OGENLoss(OGENConfig(["goat", "otter", "heron"], neighbours=2, heads=1))
    trainer = build(tmp_path, model=prompted, losses=[ogen], templates=template)
    found["context"] = model_card(trainer.model, trainer.args)
    trainer = build(tmp_path, head="trainable", head_first_epochs=5, head_first_learning_rate=1e-3)
    found["lp-ft"] = model_card(trainer.model, trainer.args)
    expected = {"full": {"similarity loss", "WiSE-FT"}, "saft": {"SAFT"}, "aclip": {"A-CLIP"}, "lora": set()}
    expected |= {"terms": {"Lipsum-FT", "CAR-FT", "LDIFS", "L2-SP", "StarFT"}, "context": {"CoOp", "OGEN"}}
    for method, names in (expected | {"radapter": {"R-Adapter"}, "lp-ft": {"LP-FT"}}).items():
        text = found[method].text
        assert {name for name, paper in ids.items() if f"https://huggingface.co/papers/{paper}" in text} == names
        assert {name for name, paper in ids.items() if f"eprint = {{{paper}}}" in text} == names
        assert text.count("@") - text.count("\\@") >= len(names) + 1  # PEFT's own
    assert "**LORA**, an adapter of [PEFT]" in found["lora"].text and "**SAFT**" not in found["lora"].text
    assert "**Full fine-tuning**" in found["full"].text and "here α = 0.5" in found["full"].text
    assert "`head_first_epochs`: `5`" in found["lp-ft"].text and "lp-ft" in metadata(found["lp-ft"])["tags"]
    given = section(found["terms"], "Training")
    assert "- `prompts`: `9`" in given and "- `weight`: `2.0`" in given and "- `tokens`" not in given
    given = section(found["context"], "Training")
    assert "that OGEN was given" in given and given.count("goat, otter, heron") == 1
    assert "- `neighbours`: `2`" in given and "TRAINABLE_TOKENS, where" in given and f"`{template}`" in given


def test_settings_that_differ_from_the_defaults_are_shown_and_nothing_private(tmp_path: Path) -> None:
    secrets = {
        "run_name": "my-secret-run",
        "hub_token": "hf_" + "x" * 30,
        "hub_model_id": "somebody/secret",
        "logging_strategy": "steps",
    }
    trainer = build(tmp_path / "secret", "saft", weight_decay=0.1, lr_scheduler_type="cosine", **secrets)
    text = str(model_card(trainer.model, trainer.args))
    for line in (
        "`learning_rate`: `0.01`",
        "`weight_decay`: `0.1`",
        "`lr_scheduler_type`: `cosine`",
        "`density`: `0.01`",
    ):
        assert f"- {line}\n" in text
    for default in ("score", "adam_beta1", "seed", "max_grad_norm", "optim", "head"):
        assert f"- `{default}`" not in text
    for private in ("secret", "hf_x", str(tmp_path), "logging", "output_dir", "entry_counts", "use_cpu"):
        assert private not in text


def test_allow_lists_name_settings_that_exist() -> None:
    from peft import IA3Config, LoraConfig, ShiraConfig, TrainableTokensConfig

    ours = [hf_robust.SAFTConfig, hf_robust.ACLIPConfig, hf_robust.RAdapterConfig]
    configs = [*ours, LoraConfig, ShiraConfig, IA3Config, TrainableTokensConfig]
    known = {field.name for config in configs for field in dataclasses.fields(config)}
    assert set(ADAPTER_SETTINGS) <= known
    known = {argument for term in TERMS.values() for argument in term.arguments()}
    assert set(LOSS_SETTINGS) == known - {"new_class_names"} and {*TITLES} == {*TERMS}
    arguments = {field.name for field in dataclasses.fields(RobustTrainingArguments)}
    assert set(TRAINING_SETTINGS) <= arguments
    for names in (ADAPTER_SETTINGS, TRAINING_SETTINGS):
        own = [name for name in names if name != "drop_path"]  # a probability
        assert not [
            name for name in own if any(word in name for word in ("path", "dir", "hub", "run", "user", "name"))
        ]


def test_data_preprocessing_and_versions() -> None:
    card = model_card(
        classifier(templates=["a {}.", "the `{}`."]),
        datasets=["me/a", "me/b"],
        data="Own *photos*.",
        train_images=1234,
    )
    text = section(card, "Training")
    assert "[me/a](https://huggingface.co/datasets/me/a), [me/b](https://huggingface.co/datasets/me/b)\n" in text
    assert (
        "- Own \\*photos\\*.\n" in text
        and "- Training images: 1,234\n" in text
        and "- Classes: red, green, blue" in text
    )
    assert "- Prompts: `a {}.`, `` the `{}`. ``\n" in text
    assert "`image_mean` `[0.48145466, 0.4578275, 0.40821073]`" in text and "`resample` `3`" in text
    assert f"- torch {torch.__version__}\n" in card.text and "- hf_robust 0" in card.text


def test_a_long_list_of_classes_is_cut() -> None:
    text = model_card(classifier(class_names=[f"c{index}" for index in range(60)])).text
    assert "c48, c49 and 10 more" in text and "c50" not in text and "to classify images of 60 classes" in text


def test_picture() -> None:
    assert "](curve.png)" in model_card(classifier(), picture="curve.png").text
    assert ".png" not in model_card(classifier()).text.replace("image.png", "")
    for name in ("../curve.png", "/tmp/curve.png", "curve.jpg", "a b.png", "x](y.png", ".png", "http://a/b.png"):
        with pytest.raises(ConfigError, match="plain name"):
            model_card(classifier(), picture=name)


# --- escaping ---


def test_nasty_names_break_neither_metadata_nor_text() -> None:
    accuracies = {"fine-tuned": Accuracy(0.5), "zero-shot": Accuracy(0.5)}
    roles = ["id"] + ["ood"] * (len(NASTY) - 1)
    sets = [EvaluationSet(name, role, 10, accuracies) for name, role in zip(NASTY, roles, strict=True)]
    named = classifier(class_names=["plain", *NASTY])
    card = model_card(named, results=CardResults(sets), data=" ".join(NASTY), base_model_id=BASE)
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict() and again.text == card.text
    indexed = metadata(card)["model-index"][0]["results"]
    assert [one["dataset"]["name"] for one in indexed] == [" ".join(name.split()) for name in NASTY]
    assert not any(html in card.text for html in HTML) and "49" not in card.text
    assert not [line for line in card.text.splitlines() if line.strip() == "---" or line.startswith("# h")]
    rows = [line for line in card.text.splitlines() if line.startswith("| ") and "| 10 |" in line]
    assert len(rows) == len(NASTY)
    assert all(row.replace("\\|", "").count("|") == 6 for row in rows)


def test_nasty_names_of_new_classes_are_escaped(tmp_path: Path) -> None:
    prompted, template = context_prompt(tiny_model("clip"), tiny_processor("clip"), 4, None, NAMES)
    ogen = OGENLoss(OGENConfig(["<img src>", "a|b", "o`o"], neighbours=2, heads=1))
    trainer = build(tmp_path, model=prompted, losses=[ogen], templates=template)
    text = model_card(trainer.model).text
    assert "&lt;img src&gt;, a\\|b, o\\`o" in text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("red", "red"),
        ("a_b*c", "a\\_b\\*c"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("a\u202eb\x00c\n d", "a b c d"),
        ("http://x", "http\\://x"),
        ("\\", "\\\\"),
    ],
)
def test_escape(text: str, escaped: str) -> None:
    assert escape(text) == escaped


@pytest.mark.parametrize(
    ("text", "span"), [("a", "`a`"), ("`", "`` ` ``"), ("a``b", "``` a``b ```"), ("a\nb", "`a b`"), ("x" * 300, None)]
)
def test_code_spans(text: str, span: str | None) -> None:
    assert code(text) == (span or "`" + "x" * 200 + "…`")


# --- the snippet works ---


def run_stock_snippet(card: ModelCard, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Executes the card's snippet for people without hf_robust, with folders in the place of the Hub."""
    _, snippet = (block.split("```", 1)[0] for block in section(card, "Use").split("```python\n")[1:])
    assert "hf_robust" not in snippet and f'"{BASE}"' in snippet
    synthetic_picture(1, 3, 40, seed=5).save(folder / "image.png")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository: str(folder))
    names: dict = {}
    exec(snippet.replace(f'"{BASE}"', repr(str(base))), names)
    return names


def expected(trainer) -> torch.Tensor:
    picture = synthetic_picture(1, 3, 40, seed=5)
    with torch.no_grad():
        inputs = trainer.processing_class.image_processor(images=[picture], return_tensors="pt")
        return trainer.model.eval()(**inputs).logits.softmax(-1)


def run_snippet(card: ModelCard, folder: Path, base: Path | None, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Executes the card's first snippet, with folders in the place of the Hub."""
    snippet = section(card, "Use").split("```python\n")[1].split("```", 1)[0]
    assert len([line for line in snippet.splitlines() if line]) <= 4
    synthetic_picture(1, 3, 40, seed=5).save(folder / "image.png")
    monkeypatch.chdir(folder)
    given = repr(str(folder)) if base is None else f"{str(folder)!r}, base={str(base)!r}"  # no name but the Hub's
    names: dict = {}
    exec(snippet.replace('"this-repository"', given), names)
    return names


@pytest.mark.parametrize(
    ("method", "settings"),
    [("saft", {}), ("aclip", {"head": "trainable"}), ("full", {}), ("lora", {"templates": "drawings"})]
    + [("full", {"task": "flyp"})],
)
def test_two_lines_give_the_trained_models_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, method: str, settings: dict
) -> None:
    tiny_model("clip").save_pretrained(tmp_path / "base")
    trainer = build(tmp_path / "run", method, max_steps=2, **settings)
    trainer.train()
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    card = model_card(trainer.model, trainer.args, base_model_id=BASE)
    best = expected(trainer)[0].max(dim=0)
    capsys.readouterr()
    run_snippet(card, folder, None if method == "full" else tmp_path / "base", monkeypatch)
    (found,) = ast.literal_eval(capsys.readouterr().out.strip())
    assert found["label"] == NAMES[best.indices] and found["score"] == pytest.approx(best.values.item(), abs=1e-4)
    ours = method in ("saft", "aclip")
    assert ("begin with `import hf_robust`" in section(card, "Use")) == ours


@pytest.mark.parametrize("family", FAMILIES)
def test_two_lines_are_enough_in_every_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    size = None if family == "siglip2" else 64  # its images keep their shape
    trainer = build(tmp_path / "run", model=tiny_lora(tiny_model(family)), family=family, image_size=size)
    trainer.save_model(str(tmp_path / "saved"))
    card = model_card(trainer.model, base_model_id=BASE)
    names = run_snippet(card, tmp_path / "saved", tmp_path / "base", monkeypatch)
    answers = names["classifier"].predict(["image.png"], top_k=3)[0]
    scores = dict(zip(NAMES, expected(trainer)[0].tolist(), strict=True))
    assert {one["label"]: one["score"] for one in answers} == pytest.approx(scores, abs=1e-4)


def test_embeddings_of_pairs_and_identities_and_several_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for make, shape in ((pairs, (1, 2)), (identities, (1, 1))):
        folder = tmp_path / make.__name__
        trainer = make(folder)
        trainer.save_model()
        names = run_snippet(model_card(trainer.model), folder, None, monkeypatch)
        assert (names["images"] @ names["images"].T).item() == pytest.approx(1, abs=1e-5)
        assert capsys.readouterr().out.count("tensor([[") == 1
        assert "embed_texts" in section(model_card(trainer.model), "Use") or shape == (1, 1)
    trainer = build(tmp_path / "several", **several())
    trainer.save_model()
    found = run_snippet(model_card(trainer.model), tmp_path / "several", None, monkeypatch)
    assert type(found["classifier"]) is hf_robust.SeveralLabels


def test_a_task_of_ones_own_is_loaded_as_ours() -> None:
    class Mine(ZeroShotClassifier):
        pass

    card = model_card(Mine(tiny_model("clip"), tiny_processor("clip"), NAMES))
    assert "hf_robust.ZeroShotClassifier.from_pretrained" in section(card, "Use")


def test_a_stock_adapter_is_offered_where_all_entries_lie_in_linear_weights() -> None:
    for where, offered in ((["q_proj", "k_proj", "v_proj"], True), (["layer_norm1"], False)):
        exclude = ["bias"] if offered else None
        config = hf_robust.SAFTConfig(density=0.01, score="magnitude", target_modules=where, exclude_modules=exclude)
        model = get_peft_model(tiny_model("clip"), config)
        assert "export_shira" not in model_card(classifier(model)).text  # no entries yet
        hf_robust.select_saft(model)
        assert (
            'hf_robust.export_shira(classifier.model, "my-shira")' in model_card(classifier(model)).text
        ) == offered


def test_a_card_without_base_still_says_how_to_load_it() -> None:
    text = model_card(classifier(tiny_lora(tiny_model("clip")))).text
    assert '.from_pretrained("this-repository", base="folder-of-the-base-model")' in text
    assert 'AutoModel.from_pretrained("folder-of-the-base-model")' in text


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.startswith("siglip")])  # which pad otherwise
def test_the_snippet_of_a_stock_adapter_works_in_every_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    trainer = build(tmp_path / "run", model=tiny_lora(tiny_model(family)), family=family)
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    card = model_card(trainer.model, base_model_id=BASE)
    names = run_stock_snippet(card, folder, tmp_path / "base", monkeypatch)
    torch.testing.assert_close(names["probabilities"], expected(trainer), rtol=1e-4, atol=1e-5)
    assert "interpolate_pos_encoding" not in card.text and "image_size" not in card.text


@pytest.mark.parametrize("family", ["clip", "metaclip_2", "siglip", "vision-text-dual-encoder"])
def test_the_snippet_takes_larger_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    trainer = build(tmp_path / "run", model=tiny_lora(tiny_model(family)), family=family, image_size=64)
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    card = model_card(trainer.model, trainer.args, base_model_id=BASE)
    assert "- `image_size`: `64`" in section(card, "Training")
    use = section(card, "Use")
    assert "model.get_image_features(**inputs, interpolate_pos_encoding=True)" in use
    stock = family in ("clip", "metaclip_2")  # the forward of two towers has no such option, SigLIP pads otherwise
    assert ("model(**inputs, interpolate_pos_encoding=True)" in use) == stock == ("Without `hf_robust`" in use)
    if stock:
        names = run_stock_snippet(card, folder, tmp_path / "base", monkeypatch)
        assert names["inputs"]["pixel_values"].shape[-2:] == (64, 64)
        torch.testing.assert_close(names["probabilities"], expected(trainer), rtol=1e-4, atol=1e-5)


# --- results ---


@pytest.mark.parametrize(
    ("name", "other_classes", "role"),
    [("id", False, "id"), ("ood_line", False, "ood"), ("new", True, "new"), ("other_pets", False, "other")]
    + [("identical", False, "ood"), ("pets", True, "other"), ("sketch", False, "ood")],
)
def test_role_by_name_or_classes(name: str, other_classes: bool, role: str) -> None:
    assert role_of(name, other_classes) == role


def test_results_of_a_sweep() -> None:
    rows = [
        {"alpha": alpha, "id_accuracy": 0.5 + alpha / 4, "new_accuracy": 0.9 - alpha / 4, "validation_accuracy": alpha}
        for alpha in (0, 0.5, 1)
    ]
    found = results_from_sweep(AlphaSweep(rows, "validation_accuracy", 0.5), {"id": ("id", 40), "new": ("other", 80)})
    assert found.chosen_alpha == 0.5 and [one.name for one in found.sets] == ["id", "new"]
    first = found.sets[0].accuracies
    assert {column: one.value for column, one in first.items()} == {
        "zero-shot": 0.5,
        "chosen alpha": 0.625,
        "fine-tuned": 0.75,
    }
    low, high = first["zero-shot"].interval
    z, n, p = 1.959964, 40, 0.5  # Wilson's formula
    centre, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2),
    )
    np.testing.assert_allclose([low, high], [centre - half, centre + half], atol=1e-6)
    with pytest.raises(DataError, match="no accuracy of the set"):
        results_from_sweep(AlphaSweep(rows, "validation_accuracy", 0.5), {"ood": ("ood", 40)})


def test_results_of_accuracies() -> None:
    accuracies = {"zero-shot": {"id": 0.5, "validation": 1.0}, "chosen alpha": {"id": 0.75, "validation": 1.0}}
    found = results_from_accuracies(accuracies, {"id": ("id", 40)}, 0.3)
    assert found.chosen_alpha == 0.3 and [(one.name, one.images) for one in found.sets] == [("id", 40)]
    assert {column: one.value for column, one in found.sets[0].accuracies.items()} == {
        "zero-shot": 0.5,
        "chosen alpha": 0.75,
    }
    assert all(one.interval[0] < one.value < one.interval[1] for one in found.sets[0].accuracies.values())


def test_a_sweep_without_the_ends_has_only_the_chosen_column() -> None:
    rows = [{"alpha": 0.5, "id_accuracy": 0.5, "validation_accuracy": 0.5}]
    found = results_from_sweep(AlphaSweep(rows, "validation_accuracy", 0.5), {"id": ("id", 40)})
    assert found.columns == ["chosen alpha"]


def test_results_of_reports() -> None:
    def report(right: int) -> SuiteReport:
        targets = np.zeros(20, dtype=int)
        predictions = np.where(np.arange(20) < right, 0, 1)
        one = SetResult("photos", "id", ["a", "b"], np.arange(20), targets, predictions, np.ones(20), "f")
        return SuiteReport({"photos": one}, {}, {})

    found = results_from_reports({"zero-shot": report(10), "fine-tuned": report(15)})
    (only,) = found.sets
    assert (only.name, only.role, only.images, found.saved) == ("photos", "id", 20, "fine-tuned")
    assert only.accuracies["fine-tuned"] == Accuracy(0.75, bootstrap_interval([True] * 15 + [False] * 5))
    assert only.accuracies["zero-shot"].value == 0.5


def test_results_that_cannot_be_are_refused() -> None:
    for value, interval in ((75.0, None), (float("nan"), None), (0.5, (0.6, 0.4)), (0.5, (-0.1, 0.4))):
        with pytest.raises(DataError, match="no fraction"):
            Accuracy(value, interval)
    half = {"zero-shot": Accuracy(0.5)}
    with pytest.raises(DataError, match="unknown role.*id, ood, new, other"):
        EvaluationSet("a", "train", 10, half)
    with pytest.raises(DataError, match="unknown column"):
        EvaluationSet("a", "id", 10, {"alpha": Accuracy(0.5)})
    with pytest.raises(DataError, match="without images"):
        EvaluationSet("a", "id", 0, half)
    with pytest.raises(DataError, match="no id on the Hub"):
        EvaluationSet("a", "id", 10, half, "/data/photos")
    with pytest.raises(DataError, match="same name"):
        CardResults([EvaluationSet("a b", "id", 10, half), EvaluationSet("a\nb", "ood", 10, half)])


@pytest.mark.parametrize("where", ["base_model_id", "datasets"])
def test_ids_that_are_none_are_refused(tmp_path: Path, where: str) -> None:
    with pytest.raises(ConfigError, match="not an id on the Hub"):
        model_card(classifier(), **{where: str(tmp_path) if where == "base_model_id" else [str(tmp_path)]})


def test_three_alphas_are_a_curve_where_all_sets_have_them():
    means = {0.0: {"id": 0.4, "ood": 0.6}, 0.7: {"id": 0.7, "ood": 0.65}, 1.0: {"id": 0.8, "ood": 0.35}}
    expected = [pytest.approx({"alpha": alpha, **of_alpha}) for alpha, of_alpha in means.items()]
    assert points_of(results()) == expected
    assert points_of(results(chosen_alpha=None)) == [] and points_of(CardResults([], 0.7)) == []
    unknown = [dataclasses.replace(one, accuracies={"zero-shot": Accuracy(0.5)}) for one in results().sets]
    assert points_of(CardResults(unknown, 0.7)) == []
    assert [point["alpha"] for point in points_of(results(chosen_alpha=1.0))] == [0.0, 1.0]
