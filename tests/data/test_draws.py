# SPDX-License-Identifier: Apache-2.0
"""What rows draw: by seed, epoch and row, in any order and any process."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_robust.data.collator import ImageCollator, OpeningCollator
from hf_robust.data.draws import DRAW, DrawingCollator, Draws, drawing, kept_states
from hf_robust.data.readable import readable_rows
from hf_robust.data.rows import labelled_images
from tests.tiny_models import image_dataset, tiny_processor

NAMES = ["red", "green", "blue"]


def three_draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def drawn(seed, epoch, row, what):
    draws = Draws(seed)
    draws.set_epoch(epoch)
    with draws.of(row, what):
        return three_draws()


KEYS = st.tuples(*[st.integers(0, 3)] * 2, st.one_of(st.integers(0, 3), st.tuples(*[st.integers(0, 2)] * 2)))


@given(KEYS, KEYS, st.sampled_from(["row", "image"]), st.sampled_from(["row", "image"]))
def test_the_same_is_drawn_for_the_same_key_alone(first, second, what, other):
    one, two = drawn(*first, what), drawn(*second, other)
    assert drawn(*first, what) == one
    same_key = (first, what) == (second, other)
    assert all((a == b) == same_key for a, b in zip(one, two, strict=True))


def test_what_is_drawn_stays_the_same_over_versions():
    """A checkpoint may be resumed with another version of the package."""
    assert drawn(42, 1, 17, "image") == (0.869098502242629, 0.20236435527579033, 0.6549738645553589)


def test_former_states_are_put_back_after_an_error_too():
    random.gauss(0, 1), np.random.randn()  # both keep a second number for the next call
    with kept_states():
        expected = random.gauss(0, 1), np.random.randn(), *three_draws()
    with pytest.raises(ValueError, match="broken"), Draws(1).of(3, "image"):
        raise ValueError(f"broken {three_draws()}")
    assert (random.gauss(0, 1), np.random.randn(), *three_draws()) == expected


def test_a_row_without_draws_takes_from_the_global_generators():
    with drawing({"label": 0}, "image"):
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
    assert torch.equal(torch.rand(2), expected)


def noise(image):
    return torch.rand(3, 8, 8)


def noisy_rows(rows):
    return {**rows, "image": [noise(image) for image in rows["image"]]}


class NoisyImages(torch.utils.data.Dataset):
    classes = NAMES

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.rand(3, 8, 8), index % 3


class NoisyStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for index in range(0 if worker is None else worker.id, 8, 1 if worker is None else worker.num_workers):
            yield torch.rand(3, 8, 8), index % 3


def noisy_collator(rows):
    labels = torch.tensor([row["label"] for row in rows])
    return {"pixel_values": torch.rand(len(rows), 3, 8, 8), "labels": labels}


def rows_and_collator(place):
    table, plain = image_dataset(8, NAMES), ImageCollator(tiny_processor("clip"))
    return {
        "collator": (table, ImageCollator(tiny_processor("clip"), transform=noise)),
        "set_transform": (table.with_transform(noisy_rows), plain),
        "torch dataset": (NoisyImages(), plain),
        "joined": (torch.utils.data.ConcatDataset([NoisyImages(), table.with_transform(noisy_rows)]), plain),
        "subset": (torch.utils.data.Subset(NoisyImages(), [3, 3, 3, 3, 0, 1, 1, 2]), plain),
        "stream": (NoisyStream(), plain),
        "own collator": (table, OpeningCollator(noisy_collator)),
    }[place]


def loader(place, draws, **settings):
    dataset, collator = rows_and_collator(place)
    rows = replace(labelled_images(dataset, "photos"), draws=draws)
    settings = {"batch_size": 2, **settings}
    return DataLoader(rows, collate_fn=DrawingCollator(collator), **settings)


def pixels(batches):
    return torch.cat([batch["pixel_values"] for batch in batches])


@pytest.mark.parametrize("place", ["collator", "set_transform", "torch dataset", "joined", "subset", "own collator"])
def test_rows_draw_the_same_with_workers_and_anew_in_every_epoch(place):
    draws = Draws(5)
    first = pixels(loader(place, draws))
    assert len(first.flatten(1).unique(dim=0)) == len(first)  # every row draws something else
    torch.manual_seed(9)
    assert torch.equal(first, pixels(loader(place, draws)))
    persistent = loader(place, draws, num_workers=2, persistent_workers=True)
    assert torch.equal(first, pixels(persistent))
    draws.set_epoch(1)
    second = pixels(persistent)
    assert not (second == first).flatten(1).all(dim=1).any()
    assert torch.equal(second, pixels(loader(place, draws)))


@pytest.mark.parametrize("place", ["collator", "set_transform", "torch dataset", "joined", "subset"])
def test_rows_draw_the_same_in_any_order_and_batch(place):
    order = [5, 1, 7, 0]
    whole = pixels(loader(place, Draws(5)))
    some = pixels(loader(place, Draws(5), sampler=order, batch_size=3))
    assert torch.equal(some, whole[order])


def test_a_stream_is_told_by_place_and_worker():
    alone, two = pixels(loader("stream", Draws(5))), loader("stream", Draws(5), num_workers=2)
    assert torch.equal(alone, pixels(loader("stream", Draws(5), num_workers=1)))
    shared = pixels(two)
    assert torch.equal(shared, pixels(two)) and len(shared.flatten(1).unique(dim=0)) == 8


def test_spawned_workers_that_stay_see_the_next_epoch():
    draws = Draws(5)
    how = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "spawn"}
    spawned = loader("collator", draws, **how)
    first = pixels(spawned)
    draws.set_epoch(1)
    second = pixels(spawned)
    assert torch.equal(second, pixels(loader("collator", draws))) and not torch.equal(first, second)


def test_looking_for_broken_images_leaves_the_global_generators_alone():
    for place in ("set_transform", "torch dataset"):
        with kept_states():
            expected = three_draws()
        assert len(readable_rows(labelled_images(rows_and_collator(place)[0], "photos"))) == 8
        with kept_states():
            assert three_draws() == expected


def test_own_collators_get_the_rows_alone():
    found = []
    rows = replace(labelled_images(image_dataset(2, NAMES), "photos"), draws=Draws(1))
    assert all(DRAW in row for row in rows)
    DrawingCollator(OpeningCollator(found.extend))(list(rows))
    assert [sorted(row) for row in found] == [["image", "label"]] * 2
