# SPDX-License-Identifier: Apache-2.0
"""VRF against the paper's formulas, written out in float64 and image by image."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from scipy.optimize import brentq
from scipy.special import expit, softmax
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from hf_robust import PerImageEnsemble, ZeroShotClassifier, context_prompt, wise_ft
from hf_robust.encoders.dual_encoder import image_embeds
from hf_robust.errors import AdapterFileError, ConfigError, DataError, MergeError
from hf_robust.evaluation.run import evaluate_suite
from hf_robust.evaluation.suite import RobustnessSuite, SuiteSet
from hf_robust.interpolation.adapters import zero_shot_copy
from hf_robust.interpolation.nearest import kth_squared_distance
from hf_robust.interpolation.per_image_fit import Fitted, choose_neighbour
from hf_robust.interpolation.temperature import HIGHEST, LOWEST, Temperature, fit_temperature
from hf_robust.tasks.ensemble import EnsembleEmbeds
from tests.evaluation.test_run import counted
from tests.interpolation.tuned import SAFT, tuned
from tests.tiny_models import image_dataset, tiny_lora, tiny_model, tiny_processor

NAMES = ["red", "green", "blue", "amber"]
PROCESSOR = tiny_processor("clip")


@pytest.fixture(scope="module")
def photos():
    """29 pictures to train on."""
    return image_dataset(29, NAMES)


@pytest.fixture(scope="module")
def held_out():
    """17 others for the temperatures."""
    return image_dataset(17, NAMES, seed=100)


def lora(seed: int = 3) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny_lora(tiny_model("clip"), init_lora_weights=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(4)
    return model


def classifier(model=None, **settings) -> ZeroShotClassifier:
    return ZeroShotClassifier(lora() if model is None else model, PROCESSOR, NAMES, **settings).eval()


def whole(seed: int = 9) -> torch.nn.Module:
    """The tiny model after a training of all its weights."""
    model, generator = tiny_model("clip"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
    return model


def fit(model, photos, held_out, zero_shot=None, **settings) -> PerImageEnsemble:
    return PerImageEnsemble.fit(model, photos, held_out, zero_shot, silent=True, **settings)


@pytest.fixture(scope="module")
def ensemble(photos, held_out) -> PerImageEnsemble:
    return fit(classifier(), photos, held_out, neighbour=2)


# --- the oracle ---


def both(model: ZeroShotClassifier, before: torch.nn.Module, images, names=NAMES):
    """Fine-tuned embeddings, and logits of both models, in float64."""
    pixel_values = PROCESSOR.image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeds = image_embeds(model.model, pixel_values).double().numpy()
        with model.classes(names):
            fine_tuned = model(pixel_values).logits.double().numpy()
        zero_shot = ZeroShotClassifier(before, PROCESSOR, names)(pixel_values).logits.double().numpy()
    return embeds, fine_tuned, zero_shot


def root(logits, labels) -> float:
    """The temperature, by another method."""
    accuracy = np.mean(logits.argmax(axis=1) == labels)
    gap = lambda t: softmax(logits / t, axis=1).max(axis=1).mean() - accuracy  # noqa: E731
    if gap(LOWEST) <= 0 or gap(HIGHEST) >= 0:
        return LOWEST if gap(LOWEST) <= 0 else HIGHEST
    return brentq(gap, LOWEST, HIGHEST, xtol=1e-12)


def weights(embeds, failures, k):
    squared = np.square(embeds[:, None] - failures).sum(axis=-1)  # (images, failures)
    return expit(-(np.sort(squared, axis=1)[:, k - 1] - 1.5) / 0.6)


def probabilities(embeds, fine_tuned, zero_shot, failures, k, temperatures):
    w = weights(embeds, failures, k)[:, None]
    ours, theirs = (softmax(z / t, axis=1) for z, t in zip((fine_tuned, zero_shot), temperatures, strict=True))
    return w * ours + (1 - w) * theirs


def check_oracle(ensemble, before, photos, held_out, k):
    """The fitted ensemble, and its answers, by hand."""
    model, labels = ensemble.classifier, np.array(photos["label"][:])
    embeds, fine_tuned, zero_shot = both(model, before, photos["image"][:])
    fails = (fine_tuned.argmax(axis=1) == labels) & (zero_shot.argmax(axis=1) != labels)
    assert 2 <= fails.sum() < len(labels)
    failures = ensemble.fitted.failures.double().numpy()
    np.testing.assert_allclose(failures, embeds[fails], atol=3e-4)  # kept in float16
    assert ensemble.fitted.images == len(labels) and ensemble.fitted.neighbour == k
    _, *logits = both(model, before, held_out["image"][:])
    temperatures = [root(z, np.array(held_out["label"][:])) for z in logits]
    fitted = ensemble.fitted.fine_tuned_temperature, ensemble.fitted.zero_shot_temperature
    np.testing.assert_allclose([one.value for one in fitted], temperatures, atol=1e-4)
    expected = probabilities(embeds, fine_tuned, zero_shot, failures, k, temperatures)
    pixel_values = PROCESSOR.image_processor(images=photos["image"][:], return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(ensemble(pixel_values).exp().numpy(), expected, rtol=1e-3, atol=1e-6)
    assert np.ptp(weights(embeds, failures, k)) > 0.01  # it matters which image it is


def test_an_adapter_on_and_off_are_the_two_models(ensemble, photos, held_out):
    check_oracle(ensemble, tiny_model("clip"), photos, held_out, k=2)


@pytest.mark.parametrize("given", ["model", "task", "copies"])
def test_a_model_trained_whole_is_given_its_zero_shot_model(given, photos, held_out):
    model, before = whole(), tiny_model("clip")
    copies = {f"model.{name}": parameter for name, parameter in zero_shot_copy(before).items()}
    zero_shot = {"model": before, "task": ZeroShotClassifier(before, PROCESSOR, ["cat", "dog"]), "copies": copies}
    found = fit(ZeroShotClassifier(model, PROCESSOR, NAMES), photos, held_out, zero_shot[given], neighbour=1)
    check_oracle(found, tiny_model("clip"), photos, held_out, k=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole().parameters(), strict=True))


def test_saft_and_a_trained_head(photos, held_out):
    model = classifier(tuned(SAFT), head="trainable")
    weight = model.class_head.weight
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    assert fit(model, photos, held_out).zero_shot is model.model
    found = fit(model, photos, held_out, neighbour=1)
    check_oracle(found, tiny_model("clip"), photos, held_out, k=1)


def test_sets_may_count_their_classes_in_another_order(ensemble, photos, held_out):
    def reordered(dataset):
        labels = [NAMES[::-1].index(NAMES[label]) for label in dataset["label"][:]]
        return dataset.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=NAMES[::-1]))

    found = fit(classifier(), reordered(photos), reordered(held_out), neighbour=2)
    assert torch.equal(found.fitted.failures, ensemble.fitted.failures) and found.settings() == ensemble.settings()


def test_four_images_by_brute_force():
    """N = 4, of which 3 are failures, one number at a time."""
    failures = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]).half()
    fitted = Fitted(failures, 4, 2, Temperature(2.0, 0.0), Temperature(0.5, 0.0))
    ensemble = PerImageEnsemble(classifier(), fitted)
    embeds = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.8, 0.6], [-1.0, 0.0]], dtype=torch.float64)
    second = [0.8, 3.6, 0.4, 3.2]  # 2 - 2 cos: the second smallest of 0 2 .8, 2 4 3.6, .4 .8 .08, 4 2 3.2
    found = ensemble.weights(embeds)
    np.testing.assert_allclose(found, [expit(-(d - 1.5) / 0.6) for d in second], rtol=1e-3)
    true = PerImageEnsemble(classifier(), fitted, metric="l2").weights(embeds)
    np.testing.assert_allclose(true, [expit(-(np.sqrt(d) - 1.5) / 0.6) for d in second], rtol=1e-3)


# --- laws ---


def mixing(neighbour=1, midpoint=1.5, temperatures=(1.0, 1.0), failures=None) -> PerImageEnsemble:
    failures = torch.eye(3)[:1].half() if failures is None else failures
    fitted = Fitted(failures, 9, neighbour, *(Temperature(t, 0.0) for t in temperatures))
    return PerImageEnsemble(CLASSIFIER, fitted, midpoint=midpoint)


CLASSIFIER = classifier()


def test_the_weight_falls_with_the_distance():
    angles = torch.linspace(0, torch.pi, 50, dtype=torch.float64)
    found = mixing().weights(torch.stack([angles.cos(), angles.sin(), 0 * angles], dim=1))
    assert (found.diff() < 0).all() and 0 < found[-1] < 0.5 < found[0] < 1
    half = torch.tensor([[0.25, (1 - 0.25**2) ** 0.5, 0.0]], dtype=torch.float64)
    assert mixing().weights(half).item() == pytest.approx(0.5, abs=1e-6)  # cos 0.25 is d² = a


@given(st.floats(0, 1), st.floats(0.1, 10), st.integers(0, 99))
def test_equal_models_answer_as_one_whatever_the_weight(w, temperature, seed):
    logits = 5 * torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    embeds = EnsembleEmbeds(logits, logits, torch.full((3,), w, dtype=torch.float64))
    found = mixing(temperatures=(temperature, temperature)).mix(embeds, logits, logits)
    torch.testing.assert_close(found, (logits / temperature).log_softmax(dim=1), rtol=1e-10, atol=1e-12)
    assert found.exp().sum(dim=1).tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_the_search_in_chunks_is_exact(k):
    generator = torch.Generator().manual_seed(k)
    others = F.normalize(torch.randn(100, 16, generator=generator), dim=1).half()
    queries = F.normalize(torch.randn(9, 16, generator=generator, dtype=torch.float64), dim=1)
    distances, _ = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(others.double()).kneighbors(queries)
    for rows_at_once in (1, 33, 100, 1000):
        found = kth_squared_distance(queries, others, k, rows_at_once)
        np.testing.assert_allclose(found, distances[:, -1] ** 2, atol=1e-12)


def test_k_is_the_codes_rule_between_one_and_all():
    assert choose_neighbour(256_000, 1_280_000, None) == 200
    assert choose_neighbour(20, 80, None) == 20  # 250 of 20
    assert choose_neighbour(1, 5000, None) == 1  # 0.2
    assert choose_neighbour(20, 80, 7) == 7 and choose_neighbour(3, 80, 7) == 3
    assert choose_neighbour(0, 80, None) == choose_neighbour(0, 80, 7) == 0


def test_without_failures_the_zero_shot_model_answers(held_out, caplog, tmp_path):
    """The adapter's Δ is zero, so both models are right and wrong at the same images."""
    photos = image_dataset(8, NAMES)
    model = tiny_lora(tiny_model("clip"))
    with caplog.at_level(logging.WARNING, "hf_robust"):
        found = fit(classifier(model), photos, held_out)
    assert "the ensemble is the zero-shot model" in caplog.text
    assert found.fitted.failures.shape == (0, 24) and found.fitted.neighbour == 0
    pixel_values = PROCESSOR.image_processor(images=photos["image"][:], return_tensors="pt")["pixel_values"]
    assert found.embed({"pixel_values": pixel_values}).weight.tolist() == [0.0] * 8
    _, _, zero_shot = both(found.classifier, tiny_model("clip"), photos["image"][:])
    expected = softmax(zero_shot / found.fitted.zero_shot_temperature.value, axis=1)
    np.testing.assert_allclose(found(pixel_values).exp(), expected, rtol=1e-4)
    found.save(tmp_path / "vrf")
    assert torch.equal(PerImageEnsemble.load(tmp_path / "vrf", found.classifier)(pixel_values), found(pixel_values))


# --- temperatures ---


@given(st.integers(0, 10_000), st.floats(0.5, 20))
def test_the_temperature_is_brentqs_root(seed, spread):
    generator = np.random.default_rng(seed)
    logits = spread * generator.normal(size=(40, 5))
    labels = np.where(generator.random(40) < 0.7, logits.argmax(axis=1), generator.integers(5, size=40))
    found = fit_temperature(torch.tensor(logits), torch.tensor(labels))
    assert found.value == pytest.approx(root(logits, labels), abs=1e-5)
    if LOWEST < found.value < HIGHEST:
        assert found.is_root


def test_a_temperature_outside_the_bracket_is_its_end_and_recorded():
    logits = 3 * torch.eye(4)
    sure = fit_temperature(logits, torch.arange(4))  # right about all: no temperature makes it sure enough
    assert sure.value == LOWEST and sure.gap == pytest.approx(0, abs=1e-6)
    wrong = fit_temperature(logits, (torch.arange(4) + 1) % 4)
    assert wrong.value == HIGHEST and wrong.gap == pytest.approx(np.exp(0.3) / (np.exp(0.3) + 3)) and not wrong.is_root


# --- evaluate_suite ---


def test_a_suite_is_what_the_formula_gives(ensemble, photos, held_out, monkeypatch):
    """The task's classes, some of them, others, and merged ones, whose logits are merged before each softmax."""
    other = held_out.cast_column("label", ClassLabel(names=["cat", "dog", "owl", "fox"]))
    some = held_out.filter(lambda row: row["label"] in (1, 3))
    merge = {"warm": ["red", "amber"], "green": None, "cold": ["blue", "green"]}
    merged = held_out.remove_columns("label").add_column("label", [n % 3 for n in held_out["label"][:]])
    sets = [
        SuiteSet("same", "id", held_out),
        SuiteSet("other", "other", other),
        SuiteSet("subset", "ood", some, NAMES, subset=[1, 3]),
        SuiteSet("merged", "ood", merged, NAMES, merge=merge),
    ]
    report = evaluate_suite(ensemble, PROCESSOR, RobustnessSuite(sets), batch_size=5, silent=True)
    fitted, k = ensemble.fitted, ensemble.fitted.neighbour
    temperatures = [fitted.fine_tuned_temperature.value, fitted.zero_shot_temperature.value]
    how = fitted.failures.double().numpy(), k, temperatures
    embeds, *own = both(ensemble.classifier, tiny_model("clip"), held_out["image"][:])
    _, *foreign = both(ensemble.classifier, tiny_model("clip"), held_out["image"][:], ["cat", "dog", "owl", "fox"])
    in_some = np.isin(held_out["label"][:], [1, 3])
    in_merged = np.array(merged["label"][:]) != 1
    pairs = [[0, 3], [1, 2]]
    of_merged = [np.stack([z[:, pair].max(axis=1) for pair in pairs], axis=1)[in_merged] for z in own]
    expected = {
        "same": probabilities(embeds, *own, *how),
        "other": probabilities(embeds, *foreign, *how),
        "subset": probabilities(embeds[in_some], *(z[in_some][:, [1, 3]] for z in own), *how),
        "merged": probabilities(embeds[in_merged], *of_merged, *how),
    }
    for name, p in expected.items():
        assert report.sets[name].predictions.tolist() == p.argmax(axis=1).tolist()
        np.testing.assert_allclose(report.sets[name].confidences, p.max(axis=1), rtol=1e-4)
    assert report.config["model"]["ensemble"] == ensemble.settings() and json.dumps(report.config)
    assert ensemble.settings()["failures"] == len(fitted.failures)


def test_another_family_is_evaluated_as_it_answers(photos, held_out):
    """SigLIP 2 has a bias, which moves no probability, and images with masks."""
    processor = tiny_processor("siglip2")
    model = ZeroShotClassifier(tiny_model("siglip2", seed=1), processor, NAMES)
    found = fit(model, photos, held_out, tiny_model("siglip2"), neighbour=1)
    suite = RobustnessSuite([SuiteSet("photos", "id", photos)])
    report = evaluate_suite(found, processor, suite, silent=True).sets["photos"]
    inputs = processor.image_processor(images=photos["image"][:], return_tensors="pt")
    np.testing.assert_allclose(report.confidences, found(**inputs).exp().amax(dim=1), rtol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert found(**inputs).dtype == torch.float32


def test_every_image_is_encoded_once_by_each_model(photos, held_out, monkeypatch):
    model, before = whole(), tiny_model("clip")
    found = fit(ZeroShotClassifier(model, PROCESSOR, NAMES), photos, held_out, before)
    of_model, of_before = counted(model, monkeypatch), counted(before, monkeypatch)
    sets = SuiteSet("a", "id", held_out), SuiteSet("b", "ood", held_out, templates="a drawing of a {}.")
    evaluate_suite(found, PROCESSOR, RobustnessSuite(sets), silent=True)
    assert of_model["images"] == of_before["images"] == len(held_out)
    assert of_model["prompts"] == of_before["prompts"] == 2 * len(NAMES)


def test_retrieval_is_refused_with_the_reason(ensemble, held_out):
    captioned = held_out.add_column("caption", [f"picture {n}" for n in range(len(held_out))])
    suite = RobustnessSuite([SuiteSet("captions", "id", captioned, task="retrieval")])
    with pytest.raises(ConfigError, match=r"no single class \(at captions\): got 'retrieval'"):
        evaluate_suite(ensemble, PROCESSOR, suite, silent=True)


# --- files ---


def test_a_saved_ensemble_answers_the_same_to_the_last_bit(ensemble, held_out, tmp_path):
    ensemble.save(tmp_path / "vrf")
    assert sorted(path.name for path in (tmp_path / "vrf").iterdir()) == ["ensemble.json", "failures.safetensors"]
    loaded = PerImageEnsemble.load(tmp_path / "vrf", classifier())
    pixel_values = PROCESSOR.image_processor(images=held_out["image"][:], return_tensors="pt")["pixel_values"]
    assert torch.equal(loaded(pixel_values), ensemble(pixel_values)) and loaded.settings() == ensemble.settings()
    with pytest.raises(MergeError, match="not empty"):
        ensemble.save(tmp_path / "vrf")
    ensemble.save(tmp_path / "vrf", overwrite=True)


def test_an_adapter_from_disk_is_known_again(photos, held_out, tmp_path):
    model = classifier(tuned(SAFT))
    fit(model, photos, held_out).save(tmp_path / "vrf")
    model.model.save_pretrained(tmp_path / "adapter")
    again = classifier(PeftModel.from_pretrained(tiny_model("clip"), tmp_path / "adapter"))
    PerImageEnsemble.load(tmp_path / "vrf", again)
    wise_ft(again, 0.5)
    with pytest.raises(AdapterFileError, match="fitted with another fine-tuned model"):
        PerImageEnsemble.load(tmp_path / "vrf", again)


def test_a_model_that_has_changed_is_refused(photos, held_out, tmp_path):
    model = classifier(tuned(SAFT))
    ensemble = fit(model, photos, held_out)
    suite = RobustnessSuite([SuiteSet("photos", "id", held_out)])
    before = evaluate_suite(ensemble, PROCESSOR, suite, silent=True).means
    wise_ft(model, 0.5)
    with pytest.raises(ConfigError, match="has changed since the ensemble was fitted"):
        evaluate_suite(ensemble, PROCESSOR, suite, silent=True)
    with pytest.raises(ConfigError, match="has changed since the ensemble was fitted"):
        ensemble.save(tmp_path / "vrf")
    assert list(tmp_path.iterdir()) == []
    wise_ft(model, 1.0)
    assert evaluate_suite(ensemble, PROCESSOR, suite, silent=True).means == before
    ensemble.save(tmp_path / "vrf")


def test_other_models_are_refused(ensemble, photos, held_out, tmp_path):
    ensemble.save(tmp_path / "vrf")
    with pytest.raises(AdapterFileError, match="fitted with another fine-tuned model"):
        PerImageEnsemble.load(tmp_path / "vrf", classifier(lora(seed=2)))
    with pytest.raises(AdapterFileError, match="another kind of zero-shot model"):
        PerImageEnsemble.load(tmp_path / "vrf", classifier(), tiny_model("clip"))
    with pytest.raises(AdapterFileError, match="other classes"):
        PerImageEnsemble.load(tmp_path / "vrf", ZeroShotClassifier(lora(), PROCESSOR, NAMES[:3]))
    with pytest.raises(AdapterFileError, match="other prompts"):
        PerImageEnsemble.load(tmp_path / "vrf", classifier(templates="photo"))
    own = ZeroShotClassifier(whole(), PROCESSOR, NAMES)
    fit(own, photos, held_out, tiny_model("clip")).save(tmp_path / "whole")
    PerImageEnsemble.load(tmp_path / "whole", own, tiny_model("clip"))
    with pytest.raises(AdapterFileError, match="fitted with another zero-shot model"):
        PerImageEnsemble.load(tmp_path / "whole", own, tiny_model("clip", seed=5))


@pytest.mark.parametrize(
    "change",
    [{"neighbour": 0}, {"neighbour": 99}, {"failures": 1}, {"midpoint": "near"}, {"format_version": 2}, {"models": 3}],
    ids=str,
)
def test_damaged_settings_are_refused(change, ensemble, tmp_path):
    ensemble.save(tmp_path / "vrf")
    file = tmp_path / "vrf" / "ensemble.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterFileError, match="ensemble"):
        PerImageEnsemble.load(tmp_path / "vrf", classifier())


# --- what is refused ---


def test_wrong_settings_and_data_are_refused(photos, held_out):
    plain, model = ZeroShotClassifier(tiny_model("clip"), PROCESSOR, NAMES), classifier()
    for arguments, settings, message in [
        ((plain,), {}, "zero-shot model is not known"),
        ((plain, tiny_model("clip").vision_model), {}, "not a supported dual encoder"),
        ((plain, {"model.logit_scale": torch.tensor(1.0)}), {}, "zero_shot lacks"),
        ((plain, tiny_model("siglip")), {}, "of another family.*SiglipModel.*CLIPModel"),
        ((plain, "clip"), {}, "no zero-shot model.*'str'"),
        ((model.model,), {}, "not a model that an ensemble is made of"),
        ((model,), {"metric": "cosine"}, "unknown metric"),
        ((model,), {"scale": 0}, "scale is out of range"),
        ((model,), {"scale": float("inf")}, "scale is out of range"),  # which JSON does not hold
        ((model,), {"midpoint": "near"}, "midpoint is no number"),
        ((model,), {"midpoint": float("nan")}, "midpoint is no number"),
        ((model,), {"neighbour": 0}, "no such neighbour"),
        ((model,), {"neighbour": 1.5}, "no such neighbour"),
    ]:
        given, zero_shot = (*arguments, None)[:2]
        with pytest.raises((ConfigError, MergeError), match=message):
            fit(given, photos, held_out, zero_shot, **settings)
    with pytest.raises(DataError, match="classes are not the classifier's .at validation"):
        fit(model, photos, image_dataset(4, ["cat", "dog"]))
    with pytest.raises(DataError, match="without labels .at train"):
        fit(model, photos.remove_columns("label"), held_out)
    context, template = context_prompt(tiny_model("clip"), PROCESSOR, init=None, class_names=NAMES)
    with pytest.raises(ConfigError, match="learned context"):
        fit(ZeroShotClassifier(context, PROCESSOR, NAMES, template), photos, held_out)
