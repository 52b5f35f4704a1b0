# SPDX-License-Identifier: Apache-2.0
"""θ₀'s embeddings of a training set, kept in a file."""

from __future__ import annotations

import multiprocessing
import os
import time

import datasets
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from torch.utils.data import TensorDataset

from hf_robust.data import embeds_cache
from hf_robust.data.collator import REFERENCE_EMBEDS, ImageCollator
from hf_robust.data.embeds_cache import pretrained_image_embeds, with_reference_embeds
from hf_robust.encoders.dual_encoder import image_embeds
from hf_robust.errors import ConfigError, DataError, NonFiniteError, UnsafeFileError
from tests.methods import Method, batch, prepared, train
from tests.tiny_models import image_dataset, synthetic_picture, tiny_model, tiny_processor

NAMES = ["red", "green", "blue"]
LORA = Method("LoRA", lambda: LoraConfig(target_modules=["q_proj", "fc1"], modules_to_save=["visual_projection"]))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "hf_robust"


@pytest.fixture
def calls(monkeypatch):
    """How many images were embedded for the file."""
    seen = []

    def spy(model, inputs):
        seen.append(len(inputs["pixel_values"]))
        return pretrained_image_embeds(model, inputs)

    monkeypatch.setattr(embeds_cache, "pretrained_image_embeds", spy)
    return seen


def cached(dataset, model=None, collator=None, **settings):
    collator = ImageCollator(tiny_processor("clip")) if collator is None else collator
    settings = {"batch_size": 4, "silent": True, **settings}
    return with_reference_embeds(dataset, tiny_model("clip") if model is None else model, collator, **settings)


VIEWS = {  # the same pictures in every shape a `datasets.Dataset` comes in
    "whole": lambda rows: rows,
    "slice": lambda rows: rows.select(range(3, 9)),
    "chosen, one twice": lambda rows: rows.select([9, 2, 5, 2, 0]),
    "shuffled": lambda rows: rows.shuffle(seed=3),
    "joined": lambda rows: datasets.concatenate_datasets([rows.select([1, 7]), rows]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_the_column_is_the_bases_embedding_of_the_image_beside_it(name, folder, calls):
    dataset = VIEWS[name](image_dataset(11, NAMES))
    joined = cached(dataset)
    assert joined.column_names == ["image", "label", REFERENCE_EMBEDS] and joined.features["label"].names == NAMES
    assert joined["label"][:] == dataset["label"][:] and max(calls) <= 4
    inputs = ImageCollator(tiny_processor("clip"))([joined[row] for row in range(len(joined))])
    assert torch.equal(inputs["pixel_values"], ImageCollator(tiny_processor("clip"))(list(dataset))["pixel_values"])
    expected = image_embeds(tiny_model("clip"), inputs["pixel_values"])
    torch.testing.assert_close(inputs[REFERENCE_EMBEDS], expected, atol=1e-6, rtol=0)
    assert sum(calls) == (len(dataset) if name != "chosen, one twice" else 4)
    (file,) = folder.iterdir()  # nothing partial
    assert [cache["filename"] for cache in joined.cache_files] == [str(file)]  # memory-mapped; no image is copied
    assert joined.with_format("arrow")[:].column(REFERENCE_EMBEDS).type.value_type == "float"


def other_processor():
    processor = tiny_processor("clip")
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    return ImageCollator(processor)


def other_activation():
    model = tiny_model("clip")
    model.config.vision_config.hidden_act = "relu"
    return model


OTHER_INPUTS = {
    "pictures": lambda: cached(image_dataset(6, NAMES, seed=1)),
    "order": lambda: cached(image_dataset(6, NAMES).select([1, 0, 2, 3, 4, 5])),
    "weights": lambda: cached(image_dataset(6, NAMES), tiny_model("clip", seed=1)),
    "format": lambda: cached(image_dataset(6, NAMES), tiny_model("clip").bfloat16()),
    "activation": lambda: cached(image_dataset(6, NAMES), other_activation()),
    "image processor": lambda: cached(image_dataset(6, NAMES), collator=other_processor()),
}


@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_other_inputs_give_another_file(name, folder, calls):
    cached(image_dataset(6, NAMES))
    OTHER_INPUTS[name]()
    assert sum(calls) == 12 and len(list(folder.iterdir())) == 2


def test_other_precision_gives_another_file(folder, calls):
    cached(image_dataset(6, NAMES))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = cached(image_dataset(6, NAMES))
    assert sum(calls) == 12 and len(list(folder.iterdir())) == 2
    inputs = ImageCollator(tiny_processor("clip"))(list(image_dataset(6, NAMES)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = image_embeds(tiny_model("clip"), inputs["pixel_values"])
    torch.testing.assert_close(torch.tensor(rounded[REFERENCE_EMBEDS][:]), expected, atol=2e-3, rtol=0)


def test_the_file_is_reused_whatever_is_trained(method, folder, calls):
    first = cached(image_dataset(6, NAMES))
    for kind in (method, LORA):
        model = prepared(kind, tiny_model("clip"), "clip")
        train(model, batch("clip"))
        assert cached(image_dataset(6, NAMES), model)[REFERENCE_EMBEDS][:] == first[REFERENCE_EMBEDS][:]
    cached(image_dataset(6, NAMES), batch_size=2)
    assert sum(calls) == 6 and len(list(folder.iterdir())) == 1


def test_an_interrupted_pass_leaves_no_file_and_no_random_number_is_drawn(folder):
    state = torch.random.get_rng_state()
    rows = {"image": [Image.new("L", (1, 300))], "label": [0]}
    elongated = datasets.Dataset.from_dict(rows, features=image_dataset(1, NAMES).features)
    broken = datasets.concatenate_datasets([image_dataset(6, NAMES), elongated])
    with pytest.raises(DataError, match="elongated"):
        cached(broken)
    assert not list(folder.iterdir())
    cached(image_dataset(6, NAMES), workers=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_files_that_are_drawn_anew_are_embedded_anew(folder, tmp_path, monkeypatch):
    """A dataset that holds paths has the same fingerprint whatever the files show."""

    def embedded(seed, place):
        place.mkdir(exist_ok=True)
        synthetic_picture(0, 3, 40, seed=seed).save(place / "0.png")
        monkeypatch.chdir(place)
        rows = datasets.Dataset.from_dict(
            {"image": ["0.png"], "label": [0]}, features=image_dataset(1, NAMES).features
        )
        return cached(rows)[REFERENCE_EMBEDS][0]

    first, other = embedded(1, tmp_path / "a"), embedded(2, tmp_path / "b")
    again = embedded(3, tmp_path / "a")
    assert len({tuple(first), tuple(other), tuple(again)}) == 3 and len(list(folder.iterdir())) == 3


class Flipping(ImageCollator):
    pass


AUGMENTING = ImageCollator(tiny_processor("clip"), transform=lambda image: image)
BAD_INPUT = {
    "transform": (lambda: image_dataset(3, NAMES).with_transform(lambda rows: rows), {}, "transform.*reset_format"),
    "augmented": (
        lambda: image_dataset(3, NAMES),
        {"collator": ImageCollator(tiny_processor("clip"), str)},
        "transform",
    ),
    "collator": (lambda: image_dataset(3, NAMES), {"collator": Flipping(tiny_processor("clip"))}, "Flipping"),
    "function": (lambda: image_dataset(3, NAMES), {"collator": lambda rows: {}}, "collator"),
    "stream": (lambda: image_dataset(3, NAMES).to_iterable_dataset(), {}, "fingerprint.*IterableDataset"),
    "foreign": (lambda: TensorDataset(torch.zeros(3)), {}, "fingerprint.*TensorDataset"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_images_that_may_change_are_refused(name, folder):
    make, settings, message = BAD_INPUT[name]
    with pytest.raises(ConfigError, match=message):
        cached(make(), **settings)
    assert not folder.exists()


def test_a_column_of_that_name_is_refused():
    with pytest.raises(DataError, match="remove_columns"):
        cached(cached(image_dataset(3, NAMES)))


def test_rows_without_the_column_among_others_are_refused():
    rows = [{"image": Image.new("L", (9, 9)), "label": 0, REFERENCE_EMBEDS: [0.5]}, {"image": Image.new("L", (9, 9))}]
    with pytest.raises(DataError, match=REFERENCE_EMBEDS):
        ImageCollator(tiny_processor("clip"))([rows[0], {**rows[1], "label": 1}])


# --- the file ---


def file_of(folder):
    (file,) = folder.glob("*.arrow")
    return file


def damaged(content):
    """A file in many ways: every seventh byte with another bit, cut to many lengths, and as it never was."""
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        yield bytes(flipped)
    for length in range(0, len(content), 31):
        yield content[:length]
    yield content[:-1]
    yield content[:-32]  # without digest, as older versions wrote it
    yield content + b"\0"
    yield b"\0" * len(content)
    yield b"no Arrow file"


def test_a_damaged_file_is_computed_anew(folder, monkeypatch, caplog):
    rows = image_dataset(2, NAMES)
    fresh = cached(rows)[REFERENCE_EMBEDS][:]
    file = file_of(folder)
    content = file.read_bytes()
    kept = torch.tensor(fresh)
    monkeypatch.setattr(embeds_cache, "pretrained_image_embeds", lambda *_: kept)  # much faster
    monkeypatch.setattr(embeds_cache, "_file", lambda *_: file)
    for number, bad in enumerate(damaged(content)):
        assert bad != content
        file.write_bytes(bad)
        caplog.clear()
        assert cached(rows)[REFERENCE_EMBEDS][:] == fresh, number
        (record,) = caplog.records
        assert record.levelname == "WARNING" and str(file) in record.message and "digest" in record.message
        assert file.read_bytes() == content
    caplog.clear()
    cached(rows)
    assert not caplog.records and number > 100


def test_a_file_that_cannot_be_read_is_computed_anew(folder, monkeypatch, caplog):
    rows = image_dataset(2, NAMES)
    fresh = cached(rows)[REFERENCE_EMBEDS][:]

    def worn_out(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(embeds_cache, "stream_sha256", worn_out)
        whole = embeds_cache._is_whole(file_of(folder))
    assert not whole and "Input/output error" in caplog.text
    assert cached(rows)[REFERENCE_EMBEDS][:] == fresh


def test_embeddings_that_are_not_finite_are_not_kept(folder):
    model = tiny_model("clip")
    with torch.no_grad():
        model.visual_projection.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="embeddings of images"):
        cached(image_dataset(2, NAMES), model)
    assert not list(folder.iterdir())


def test_what_is_no_file_in_its_place_is_refused(folder):
    rows = image_dataset(2, NAMES)
    cached(rows)
    file = file_of(folder)
    file.unlink()
    file.mkdir()
    with pytest.raises(UnsafeFileError, match=f"not a regular file.*{file.name}"):
        cached(rows)
    assert list(folder.iterdir()) == [file]


def test_what_killed_processes_left_is_neither_taken_nor_kept(folder):
    rows = image_dataset(2, NAMES)
    fresh = cached(rows)[REFERENCE_EMBEDS][:]
    file = file_of(folder)
    file.unlink()
    for name, hours in {"dead": 2, "at-work": 0.5}.items():
        partial = file.with_suffix(f".{name}.partial")
        partial.write_bytes(b"half")
        then = time.time() - 3600 * hours
        os.utime(partial, (then, then))
    assert cached(rows)[REFERENCE_EMBEDS][:] == fresh
    assert {one.name for one in folder.iterdir()} == {file.name, file.with_suffix(".at-work.partial").name}


def in_another_process(folder, barrier, results):
    datasets.config.HF_DATASETS_CACHE = folder
    torch.set_num_threads(1)
    barrier.wait(60)
    results.put(cached(image_dataset(6, NAMES))[REFERENCE_EMBEDS][:])


def test_processes_that_write_at_once_read_the_same(folder, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=in_another_process, args=(tmp_path, barrier, results), daemon=True) for _ in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1] == cached(image_dataset(6, NAMES))[REFERENCE_EMBEDS][:]
    assert list(folder.iterdir()) == [file_of(folder)]
