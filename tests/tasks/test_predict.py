# SPDX-License-Identifier: Apache-2.0
"""Predictions and embeddings of images as users have them."""

from __future__ import annotations

import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from PIL import Image

from hf_robust import ImageTextPairs, SeveralLabels, ZeroShotClassifier
from hf_robust.data import given_images
from hf_robust.encoders.class_embeds import class_embeddings
from hf_robust.encoders.dual_encoder import image_embeds, text_embeds, tokenize
from hf_robust.errors import ConfigError, DataError, NonFiniteError
from tests.tiny_models import FAMILIES, image_dataset, synthetic_picture, tiny_model, tiny_processor
from tests.trainers import NAMES, build

from .saved import PICTURES


@pytest.fixture(scope="module")
def classifier():
    return ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), NAMES, head="trainable").eval()


@pytest.fixture(scope="module")
def several():
    task = SeveralLabels(tiny_model("clip"), tiny_processor("clip"), NAMES).eval()
    with torch.no_grad():
        task.label_scale.fill_(1.0)
    return task


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def logits_of(task, pictures):
    pixels = task.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return task(pixels).logits  # (images, classes)


# --- answers ---


def test_the_best_class_and_its_probability(classifier):
    scores, labels = logits_of(classifier, PICTURES).softmax(dim=1).max(dim=1)
    expected = [{"label": NAMES[i], "score": s} for i, s in zip(labels.tolist(), scores.tolist(), strict=True)]
    assert classifier.predict(PICTURES) == expected


def test_the_best_of_all(classifier):
    found = classifier.predict(PICTURES, top_k=2)
    assert [answers[0] for answers in found] == classifier.predict(PICTURES) and {len(a) for a in found} == {2}
    whole = classifier.predict(PICTURES, top_k=99)
    assert all(abs(sum(one["score"] for one in answers) - 1) < 1e-6 for answers in whole)


def test_other_names_are_answered_by_their_prompts(classifier):
    head = class_embeddings(classifier.model, classifier.processor, ["lynx", "otter"])  # (classes, dim)
    expected = (classifier.model.logit_scale.exp() * classifier.embed_images(PICTURES) @ head.T).softmax(dim=1)
    found = classifier.predict(PICTURES, class_names=["lynx", "otter"], top_k=2)
    for answers, scores in zip(found, expected.detach(), strict=True):
        by_label = {one["label"]: one["score"] for one in answers}
        torch.testing.assert_close(torch.tensor([by_label["lynx"], by_label["otter"]]), scores)
    assert classifier.class_names == NAMES


def test_some_of_its_names_are_answered_by_the_trained_head_and_no_others(classifier):
    changed = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), NAMES, head="trainable").eval()
    changed.class_head.weight.data.neg_()
    expected = logits_of(changed, PICTURES)[:, [2, 0]].softmax(dim=1)  # of blue, red
    found = changed.predict(PICTURES, class_names=["Blue", "red"], top_k=3)
    assert [{one["label"] for one in answers} for answers in found] == [{"Blue", "red"}] * 3
    assert [answers[0]["score"] for answers in found] == expected.max(dim=1).values.tolist()


def test_labels_are_plain_strings(classifier):
    given = ZeroShotClassifier(classifier.model, classifier.processor, np.array(NAMES)).eval()
    found = [given.predict(PICTURES), classifier.predict(PICTURES, class_names=np.array(["lynx", "otter"]))]
    assert {type(one["label"]) for answers in found for one in answers} == {str}


def test_the_same_as_the_trainers_evaluation_of_names_in_another_order(tmp_path):
    trainer = build(tmp_path, num_train_epochs=6)
    trainer.train()
    test, order = image_dataset(9, NAMES, seed=50), [2, 0, 1]
    named = ClassLabel(names=[NAMES[i] for i in order])
    other = test.map(lambda row: {"label": order.index(row["label"])}).cast_column("label", named)
    found = trainer.model.predict(other, class_names=named.names, silent=True)
    accuracy = np.mean([one["label"] == named.names[i] for one, i in zip(found, other["label"], strict=True)])
    assert accuracy == trainer.evaluate(other)["eval_accuracy"] > 0.5


def test_several_labels_are_those_from_the_threshold_on(several):
    logits = logits_of(several, PICTURES)
    several.threshold = logits.median().item()
    found = several.predict(PICTURES)
    assert [len(answers) for answers in found] == (logits >= several.threshold).sum(dim=1).tolist()
    scores = [one["score"] for answers in found for one in answers]
    assert min(scores) == torch.tensor(several.threshold).sigmoid().item()
    several.threshold = 1e3
    assert several.predict(PICTURES) == [[], [], []]
    best = several.predict(PICTURES, top_k=1)
    assert [answers[0]["label"] for answers in best] == [NAMES[i] for i in logits.argmax(dim=1)]
    assert len(several.predict(PICTURES, class_names=["red"], top_k=5)[0]) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_batches_of_mixed_sizes(family):
    task = ZeroShotClassifier(tiny_model(family), tiny_processor(family), NAMES).eval()
    whole, one_by_one = task.predict(PICTURES), task.predict(PICTURES, batch_size=1)
    assert [one["label"] for one in whole] == [one["label"] for one in one_by_one]
    torch.testing.assert_close(task.embed_images(PICTURES), task.embed_images(PICTURES, batch_size=2))


# --- images as they come ---


@pytest.fixture(scope="module")
def picture():
    return synthetic_picture(1, 3, 40, seed=5)


@pytest.fixture(scope="module")
def web(picture):
    """A server of files: its address."""
    contents = {"/a.png": png(picture), "/text": b"no image", "/long": bytes(5000)}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/a.png")
                self.end_headers()
                return
            found = contents.get(self.path)
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


KINDS = {
    "path": lambda picture, path, web: path,
    "Path": lambda picture, path, web: Path(path),
    "picture": lambda picture, path, web: picture,
    "array": lambda picture, path, web: np.asarray(picture),
    "tensor": lambda picture, path, web: torch.from_numpy(np.array(picture)).permute(2, 0, 1),
    "bytes": lambda picture, path, web: {"bytes": png(picture), "path": None},
    "address": lambda picture, path, web: f"{web}/a.png",
    "address that has moved": lambda picture, path, web: f"{web}/moved",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_alone_and_in_a_list(classifier, picture, web, tmp_path, kind):
    picture.save(tmp_path / "a.png")
    image = KINDS[kind](picture, str(tmp_path / "a.png"), web)
    expected = classifier.predict([picture])
    assert classifier.predict(image) == classifier.predict([image]) == expected
    assert classifier.predict((image, picture), silent=True) == classifier.predict([picture, picture])


def test_arrays_of_several_images_and_of_grey(classifier, picture):
    arrays = np.stack([np.asarray(picture)] * 2)  # (images, height, width, 3)
    assert classifier.predict(arrays) == classifier.predict([picture, picture])
    assert classifier.predict(np.asarray(picture.convert("L"))) == classifier.predict(picture.convert("L"))


def test_datasets_and_their_columns(classifier):
    dataset = image_dataset(5, NAMES).rename_column("image", "img")
    expected = classifier.predict([*dataset["img"]])
    assert classifier.predict(dataset) == classifier.predict(dataset["img"]) == expected
    assert classifier.predict(dataset.select([])) == []


def test_no_images_and_no_texts(classifier):
    assert classifier.predict([]) == [] and classifier.predict([], top_k=2, class_names=["cat"]) == []
    assert classifier.embed_images([]).shape == classifier.embed_texts([]).shape == (0, 24)


BAD = {
    "broken": (lambda tmp, web: tmp / "broken.png", "decoded.*at image 1, .*broken.png"),
    "missing": (lambda tmp, web: str(tmp / "none.png"), "cannot be opened.*at image 1, .*none.png"),
    "a folder": (lambda tmp, web: tmp, "cannot be opened.*at image 1"),
    "floats": (lambda tmp, web: np.zeros((4, 4, 3)), r"array is no image \(at image 1\).*\(4, 4, 3\) float64.*uint8"),
    "channels first": (lambda tmp, web: np.zeros((3, 4, 4), np.uint8), "array is no image.*image 1"),
    "no pixels": (lambda tmp, web: np.zeros((0, 4, 3), np.uint8), "without pixels.*image 1"),
    "a tensor without pixels": (
        lambda tmp, web: torch.zeros(3, 0, 40),
        r"without pixels \(at image 1\).*\(3, 0, 40\)",
    ),
    "bytes that are none": (lambda tmp, web: {"bytes": 5}, r"unknown type \(at image 1\): got 'int'; allowed bytes"),
    "elongated": (lambda tmp, web: Image.new("RGB", (1, 99)), "too elongated.*image 1"),
    "nothing": (lambda tmp, web: None, "unknown type.*image 1"),
    "not there": (lambda tmp, web: f"{web}/none", "cannot be downloaded.*404.*at image 1, http"),
    "no image": (lambda tmp, web: f"{web}/text", "cannot be opened.*at image 1, http"),
    "no server": (lambda tmp, web: "http://127.0.0.1:1/a.png", "cannot be downloaded.*image 1"),
    "no address": (lambda tmp, web: "http://", "cannot be downloaded.*image 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_says_which_image(classifier, picture, web, tmp_path, name):
    (tmp_path / "broken.png").write_bytes(png(picture)[:900])
    make, message = BAD[name]
    with pytest.raises(DataError, match=message):
        classifier.predict([picture, make(tmp_path, web)])


def test_a_broken_image_of_a_dataset_is_named(classifier, picture, tmp_path):
    dataset = image_dataset(2, NAMES).cast_column("image", image_dataset(1, NAMES).features["image"])
    rows = [{"bytes": png(picture), "path": None}, {"bytes": png(picture)[:900], "path": None}]
    broken = dataset.remove_columns("image").add_column("image", rows)
    broken = broken.cast_column("image", dataset.features["image"])
    for images in (broken, broken["image"]):
        with pytest.raises(DataError, match="at images, row 1"):
            classifier.predict(images)


def test_a_download_has_an_end(classifier, web, monkeypatch):
    monkeypatch.setattr(given_images, "MOST_BYTES", 4000)
    with pytest.raises(DataError, match="too large.*4,000 bytes"):
        classifier.predict(f"{web}/long")


@pytest.mark.parametrize("images", [3, None, {"a.png", "b.png"}, (one for one in "ab")])
def test_what_holds_no_images(classifier, images):
    with pytest.raises(DataError, match="no images.*paths, http"):
        classifier.predict(images)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"top_k": 0}, ConfigError, "top_k"),
        ({"top_k": True}, ConfigError, "top_k"),
        ({"batch_size": 0}, ConfigError, "batch_size.*allowed 1 or more$"),
        ({"batch_size": None}, ConfigError, "batch_size.*got 'None'; allowed 1 or more$"),
        ({"class_names": "cat"}, DataError, "no list of class names"),
        ({"class_names": []}, DataError, "no list of class names"),
        ({"class_names": (name for name in NAMES)}, DataError, "no list of class names.*got 'generator'"),
        ({"class_names": ["cat", "Cat"]}, DataError, "twice"),
    ],
)
def test_settings_that_are_none(classifier, how, error, message):
    with pytest.raises(error, match=message):
        classifier.predict(PICTURES, **how)
    assert classifier.class_names == NAMES


@pytest.mark.parametrize("task", [ZeroShotClassifier, SeveralLabels])
def test_class_names_that_are_no_list(classifier, task):
    with pytest.raises(DataError, match="no list of class names.*got 'generator'"):
        task(classifier.model, classifier.processor, (name for name in NAMES))


# --- embeddings ---


def test_embeddings_are_those_of_the_towers():
    model, processor = tiny_model("siglip"), tiny_processor("siglip")
    pairs = ImageTextPairs(model, processor)
    pixels = processor.image_processor(images=PICTURES, return_tensors="pt")["pixel_values"]
    found, texts = pairs.embed_images(PICTURES), pairs.embed_texts(("a cat", "a dog"))
    with torch.no_grad():
        assert torch.equal(found, image_embeds(model.eval(), pixels))
        assert torch.equal(texts, text_embeds(model, **tokenize(processor, ["a cat", "a dog"], model)))
    assert not found.requires_grad and found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(pairs.embed_texts("a cat"), texts[:1])


def test_texts_that_are_none_or_too_long(classifier):
    with pytest.raises(DataError, match=r"no texts \(at texts\): got 'int'; allowed a string"):
        classifier.embed_texts(5)
    with pytest.raises(DataError, match=r"no text \(at texts, 1\)"):
        classifier.embed_texts(["a", 3])
    with pytest.raises(DataError, match="1 of 2 texts are longer.*row 1"):
        classifier.embed_texts(["a", "x" * 200])


# --- what stays ---


def test_mode_gradients_and_random_state_stay():
    task = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), NAMES).train()
    task.model.text_model.eval()
    modes = [module.training for module in task.modules()]
    before = torch.get_rng_state()
    expected = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), NAMES).eval().predict(PICTURES)
    assert task.predict(PICTURES) == expected
    task.embed_texts(["a"])
    assert [module.training for module in task.modules()] == modes
    assert torch.equal(before, torch.get_rng_state()) and task.model.logit_scale.grad is None
    with pytest.raises(DataError):
        task.predict("none.png")
    assert [module.training for module in task.modules()] == modes


def test_prompts_are_encoded_once(monkeypatch):
    task = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), NAMES).eval()
    encoded = []
    encode = task.prompts.encode
    monkeypatch.setattr(task.prompts, "encode", lambda *args: encoded.append(1) or encode(*args))
    for picture in PICTURES:
        task.predict(picture)
    assert len(encoded) == 1


def test_a_bar_for_several_batches_on_stderr(classifier, capsys):
    for how, shown in (({"batch_size": 2}, True), ({"batch_size": 2, "silent": True}, False), ({}, False)):
        classifier.predict(PICTURES, **how)
        printed = capsys.readouterr()
        assert not printed.out and ("Looking at images" in printed.err) is shown


def test_weights_that_are_not_finite():
    task = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), NAMES, head="trainable").eval()
    task.class_head.bias.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="logits are not finite.*dtype"):
        task.predict(PICTURES)


@pytest.mark.parametrize("tower", ["visual_projection", "text_projection"])
def test_embeddings_that_are_not_finite(tower):
    task = ImageTextPairs(tiny_model("clip"), tiny_processor("clip")).eval()
    getattr(task.model, tower).weight.data[0, 0] = torch.nan
    embed, given = {"visual_projection": (task.embed_images, PICTURES)}.get(tower, (task.embed_texts, ["a cat"]))
    with pytest.raises(NonFiniteError, match=rf"embeddings are not finite \(at {embed.__name__}\).*dtype"):
        embed(given)
