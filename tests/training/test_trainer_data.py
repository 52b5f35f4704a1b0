# SPDX-License-Identifier: Apache-2.0
"""What comes into a trainer: the same sets, classes and images at every entrance."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Value, load_dataset
from PIL import Image

from hf_robust import ImageCollator, ZeroShotClassifier
from hf_robust.errors import ConfigError, DataError
from tests.tiny_models import image_dataset, synthetic_picture, tiny_model, tiny_processor
from tests.trainers import NAMES, build, same, weights


def renamed(dataset, names):
    """The same images; their folder sorts the classes as in `names`, spelled as there."""
    place = {name.casefold().replace("_", " ").strip(): index for index, name in enumerate(names)}
    own = dataset.features["label"].names
    labels = [place[own[label].replace("_", " ")] for label in dataset["label"][:]]
    return dataset.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=names))


FOOD = ["hot_dog", "ice_cream", "tea"]


@pytest.fixture(scope="module")
def of_food(tmp_path_factory):
    """Trainers by head, whose trained heads are surely not the zero-shot ones."""
    trainers = {}
    for head in ("trainable", "live"):
        folder = tmp_path_factory.mktemp(head)
        trainers[head] = build(folder, head=head, train_dataset=image_dataset(18, FOOD), num_train_epochs=4)
        trainers[head].train()
    trainers["trainable"].model.class_head.weight.data.neg_()
    return trainers


SPELLINGS = {
    "same": FOOD,
    "spelled otherwise": ["Hot dog", "ice cream ", "TEA"],
    "reordered": ["tea", "hot_dog", "ice_cream"],
    "subset": ["tea", "hot dog"],
}


@pytest.mark.parametrize("head", ["trainable", "live"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_known_classes_are_answered_by_the_rows_of_the_head(of_food, head, spelling):
    trainer, names = of_food[head], SPELLINGS[spelling]
    every = image_dataset(12, FOOD, seed=50)
    kept = [name.casefold().replace("_", " ").strip() for name in names]
    rows = [row for row, label in enumerate(every["label"][:]) if FOOD[label].replace("_", " ") in kept]
    some = renamed(every.select(rows), names)
    metrics, output = trainer.evaluate(some), trainer.predict(some)
    whole = trainer.predict(every.select(rows)).predictions  # (images, classes)
    order = [[name.replace("_", " ") for name in FOOD].index(name) for name in kept]
    order += [index for index in range(3) if index not in order]
    np.testing.assert_array_equal(output.predictions, whole[:, order])
    assert output.label_ids.tolist() == some["label"][:]
    right = (output.predictions.argmax(axis=1) == output.label_ids).mean()
    assert metrics["eval_accuracy"] == output.metrics["test_accuracy"] == right
    assert metrics["eval_loss"] == output.metrics["test_loss"]
    assert head == "live" or metrics["eval_accuracy"] == 0


def test_other_classes_are_answered_among_themselves_at_every_entrance(of_food):
    others = image_dataset(9, ["cat", "hot_dog"], seed=90)
    trainer = of_food["trainable"]
    output = trainer.predict(others)
    assert output.predictions.shape == (9, 2)
    assert output.metrics["test_accuracy"] == trainer.evaluate(others)["eval_accuracy"]
    classifier = ZeroShotClassifier(trainer.model.model, trainer.processing_class, ["cat", "hot dog"]).eval()
    with torch.no_grad():
        inputs = tiny_processor("clip").image_processor(images=others["image"][:], return_tensors="pt")
        np.testing.assert_allclose(output.predictions, classifier(inputs["pixel_values"]).logits, rtol=1e-4)


def test_best_checkpoint_and_sweep_read_the_same_numbers(tmp_path, of_food):
    turned = renamed(image_dataset(12, FOOD, seed=50), ["tea", "hot dog", "ice cream"])
    trainer = of_food["live"]
    sweep = trainer.wise_ft_sweep(turned, alphas=[0.0, 1.0])
    assert sweep.rows[1]["validation_accuracy"] == trainer.evaluate(turned)["eval_accuracy"]


def test_rows_without_labels_can_be_predicted(of_food):
    every = image_dataset(12, FOOD, seed=50)
    output = of_food["live"].predict(every.remove_columns("label"))
    assert output.label_ids is None and not any("accuracy" in name for name in output.metrics)
    np.testing.assert_array_equal(output.predictions, of_food["live"].predict(every).predictions)
    with pytest.raises(DataError, match="no column 'label'.*eval"):
        of_food["live"].evaluate(every.remove_columns("label"))


WNIDS, WORDS = ["n01", "n02", "n03"], ["tench", "goldfish", "shark"]


@pytest.mark.parametrize("class_names", [WORDS, dict(zip(WNIDS, WORDS, strict=True))])
def test_given_names_are_remembered_for_sets_that_lack_a_class(tmp_path, class_names):
    test = renamed(image_dataset(12, WNIDS, seed=50).filter(lambda row: row["label"] != 1), WNIDS[:1] + WNIDS[2:])
    trainer = build(tmp_path, train_dataset=image_dataset(18, WNIDS), eval_dataset=test, class_names=class_names)
    assert trainer.model.class_names == WORDS
    trainer.evaluate()
    seen = []
    with trainer.model.classes(["n01", "n03"]):
        seen = trainer.model.class_names
    assert seen == ["tench", "shark", "goldfish"] and trainer.model.class_names == WORDS


def test_names_in_another_order_are_refused_with_the_pairing(tmp_path):
    folders = image_dataset(12, sorted(map(str, range(12))))  # as load_dataset("imagefolder") numbers them
    words = "apple bear cat dog egg fish goat hat ink jar kite lamp".split()
    with pytest.raises(DataError, match="'10': 'cat'.*Pass a mapping"):
        build(tmp_path, train_dataset=folders, eval_dataset=None, class_names=words)
    by_name = dict(zip(map(str, range(12)), words, strict=True))
    trainer = build(tmp_path, train_dataset=folders, eval_dataset=None, class_names=by_name)
    assert trainer.model.class_names[folders.features["label"].str2int("10")] == "kite"


def test_a_classifier_has_the_classes_of_the_training_set(tmp_path):
    classifier = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), ["blue", "green", "red"])
    with pytest.raises(DataError, match="another order"):
        build(tmp_path, model=classifier)
    with pytest.raises(ConfigError, match="brings its own settings.*class_names"):
        build(tmp_path, model=classifier, class_names=NAMES)
    of_words = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), WORDS)
    trainer = build(tmp_path, model=of_words, train_dataset=image_dataset(6, WNIDS), eval_dataset=None)
    assert trainer.model.class_space.relate(["n03"]).words[0] == "shark"


def test_a_training_set_that_is_set_later_has_the_same_classes(tmp_path):
    trainer = build(tmp_path)
    trainer.train_dataset = renamed(image_dataset(18, NAMES), ["blue", "red", "green"])
    with pytest.raises(DataError, match="other classes than the classifier, or in another order"):
        trainer.train()
    again = build(tmp_path, model=build(tmp_path, train_dataset=image_dataset(6, WNIDS), class_names=WORDS).model)
    with pytest.raises(DataError, match="other classes"):
        again.train()


def test_numbers_without_names_are_refused_for_classes_that_are_numbers_in_another_order(tmp_path):
    names = sorted(map(str, range(11)))
    trainer = build(tmp_path, train_dataset=image_dataset(22, names), eval_dataset=None)
    with pytest.raises(DataError, match="labels without names.*cast_column"):
        trainer.evaluate(image_dataset(11, names).cast_column("label", Value("int64")))
    in_order = build(tmp_path, train_dataset=image_dataset(6, ["0", "1", "2"]), eval_dataset=None)
    in_order.evaluate(image_dataset(3, ["0", "1", "2"]).cast_column("label", Value("int64")))


def test_a_stream_that_has_forgotten_its_classes_is_refused(tmp_path):
    stream = image_dataset(6, ["blue", "green", "red"]).to_iterable_dataset()
    trainer = build(tmp_path)
    with pytest.raises(DataError, match="stream without features.*at late.*features="):
        trainer.evaluate({"late": stream.map(lambda row: row)})
    trainer.evaluate({"late": stream.map(lambda row: row, features=stream.features)})


def test_one_head_inside_another(of_food):
    model = of_food["live"].model
    with model.classes(["cat", "dog"]), model.classes(FOOD):
        assert model.class_names == [name.replace("_", " ") for name in FOOD] and model._other_embeds is None


# --- images ---


def png(image, **settings):
    stream = io.BytesIO()
    image.save(stream, "PNG", **settings)
    return stream.getvalue()


def folder_of_images(root, contents):
    for label, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        content = contents.get(name, png(synthetic_picture(label, 3, 40, seed=label)))
        (root / name / "0.png").write_bytes(content)
    return load_dataset("imagefolder", data_dir=str(root), split="train")  # as the documentation does


def test_a_broken_file_is_named(tmp_path):
    broken = png(synthetic_picture(1, 3, 40, seed=1))[:60]
    photos = folder_of_images(tmp_path / "photos", {"green": broken})
    with pytest.raises(DataError, match="decoded.*train_dataset, row 1, .*green/0.png"):
        build(tmp_path / "out", train_dataset=photos, eval_dataset=None).train()
    with pytest.raises(DataError, match="decoded.*late, row 1, .*green/0.png"):
        build(tmp_path / "out", train_dataset=image_dataset(6, ["blue", "green", "red"])).evaluate({"late": photos})


def test_limits_and_orientation_hold_before_anything_decodes(tmp_path, monkeypatch):
    image = synthetic_picture(0, 3, 40, seed=0).crop((0, 0, 40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    grey = Image.fromarray(np.full((20, 40), 30_000, dtype=np.uint16))
    photos = folder_of_images(tmp_path, {"red": png(image, exif=exif), "green": png(grey)})
    monkeypatch.setattr("datasets.features.Image.decode_example", lambda *a, **k: pytest.fail("decoded"))
    trainer = build(tmp_path / "out", train_dataset=photos, eval_dataset=None)
    shown = [trainer.train_dataset[row]["image"].open() for row in range(3)]
    names = photos.features["label"].names
    assert shown[names.index("red")].size == (20, 40) and shown[names.index("green")].getpixel((0, 0)) == (117,) * 3


def spoiled(n, bad, seed=0):
    table = image_dataset(n, NAMES, seed=seed).with_format("arrow")[:].to_pylist()
    for row in bad:
        table[row]["image"] = {"bytes": b"no image", "path": f"{row}.png"}
    return Dataset.from_list(table, features=image_dataset(1, NAMES).features)


def test_images_that_cannot_be_used_are_skipped_counted_and_listed(tmp_path, caplog):
    sets = {"id": spoiled(7, [3], seed=50), "good": image_dataset(7, NAMES, seed=50)}
    settings = {"train_dataset": spoiled(18, [2, 11]), "eval_dataset": sets, "on_bad_image": "skip"}
    trainer = build(tmp_path / "skip", **settings)
    assert len(trainer.train_dataset) == 16 and "11.png" in trainer.train_dataset.skipped[1]
    assert "2 of 18 images are left out" in caplog.text and "row 2, 2.png" in caplog.text
    trainer.train()
    metrics = trainer.evaluate()
    assert trainer.predict(sets["id"]).metrics["test_skipped_images"] == 1
    assert metrics["eval_id_skipped_images"] == 1 and "eval_good_skipped_images" not in metrics
    kept = [row for row in range(18) if row not in (2, 11)]
    expected = build(tmp_path / "kept", train_dataset=image_dataset(18, NAMES).select(kept))
    expected.train()
    assert same(weights(trainer), weights(expected))
    with pytest.raises(DataError, match="train_dataset, row"):
        build(tmp_path / "raise", **settings | {"on_bad_image": "raise"}).train()


@pytest.mark.parametrize("place", ["collator", "set_transform"])
def test_augmentation_changes_training_and_not_evaluation(tmp_path, place):
    turned = []

    def turn(image):
        turned.append(image.size)
        return image.rotate(180)

    def turn_rows(rows):
        return {**rows, "image": [turn(image) for image in rows["image"]]}

    train, settings = image_dataset(18, NAMES), {"num_train_epochs": 1, "seed": 3}
    if place == "collator":
        augmented = {"data_collator": ImageCollator(tiny_processor("clip"), transform=turn)}
    else:
        augmented = {"train_dataset": train.with_transform(turn_rows)}
    trainer = build(tmp_path, **augmented, **settings)
    before = trainer.evaluate()
    assert turned == [] and before["eval_id_loss"] == build(tmp_path).evaluate()["eval_id_loss"]
    torch.manual_seed(7)  # every loader of torch draws from the global state
    trainer.train()
    assert len(turned) == 18
    rotated = train.map(lambda row: {"image": row["image"].rotate(180)})
    expected = build(tmp_path, train_dataset=rotated, **settings)
    torch.manual_seed(7)
    expected.train()
    assert same(weights(trainer), weights(expected))


def test_selection_of_saft_looks_at_images_as_they_are(tmp_path):
    seen = []
    collator = ImageCollator(tiny_processor("clip"), transform=lambda image: seen.append(1) or image)
    build(tmp_path, "saft", data_collator=collator).select_entries()
    assert seen == []


def test_a_collator_of_ones_own_gets_opened_images(tmp_path):
    modes = []

    def collate(rows):
        modes.extend(row["image"].mode for row in rows)
        return ImageCollator(tiny_processor("clip"))(rows)

    metrics = build(tmp_path, data_collator=collate).evaluate()
    assert set(modes) == {"RGB"} and metrics == pytest.approx(build(tmp_path).evaluate(), rel=10)


def test_workers_that_stay_do_not_show_one_set_for_another(tmp_path):
    """Trainer keeps the loader of the first set that has no name, and gives it for all others."""
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = build(tmp_path, **settings)
    first, second = image_dataset(6, NAMES, seed=50), image_dataset(7, NAMES, seed=70)
    losses = [trainer.evaluate(one)["eval_loss"] for one in (first, second)]
    assert losses == [build(tmp_path).evaluate(one)["eval_loss"] for one in (first, second)]
    assert losses[0] != losses[1]


def test_sets_that_are_set_later_come_in_the_same_way(tmp_path):
    trainer = build(tmp_path)
    trainer.eval_dataset = {"late": spoiled(3, [1])}
    with pytest.raises(DataError, match="late, row 1, 1.png"):
        trainer.evaluate()
    trainer.train_dataset = image_dataset(6, NAMES).rename_column("label", "kind")
    with pytest.raises(DataError, match="no column 'label'"):
        trainer.train()


def test_a_stream_trains_and_is_evaluated(tmp_path):
    stream, test = (image_dataset(n, NAMES).to_iterable_dataset() for n in (18, 6))
    trainer = build(tmp_path, train_dataset=stream, eval_dataset=test, max_steps=2)
    trainer.train()
    assert math.isclose(trainer.evaluate()["eval_loss"], trainer.evaluate(image_dataset(6, NAMES))["eval_loss"])
