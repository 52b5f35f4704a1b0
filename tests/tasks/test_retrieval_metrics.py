# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_robust.errors import ConfigError, DataError, NonFiniteError
from hf_robust.tasks.retrieval_metrics import distinct_texts, retrieval_metrics


def by_brute_force(images, texts, owners, scale):
    """All similarities at once in float64, an image or a text at a time."""
    images, texts = (x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1)[:, None] for x in (images, texts))
    similarities, owners = images @ texts.T, np.asarray(owners)
    of_images, of_texts = log_softmax(scale * similarities, axis=1), log_softmax(scale * similarities, axis=0)
    image_ranks, image_losses = [], []
    for image, row in enumerate(similarities):
        own = owners == image
        if own.any():
            image_ranks.append(1 + (row[~own] >= row[own].max() - 1e-9).sum())
            image_losses.append(-of_images[image, own].mean())
    columns = list(zip(owners, similarities.T, strict=True))
    text_ranks = [(column >= column[owner] - 1e-9).sum() for owner, column in columns]
    text_losses = [-column[owner] for owner, column in zip(owners, of_texts.T, strict=True)]
    found = {"loss": (np.mean(image_losses) + np.mean(text_losses)) / 2}
    for direction, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        found |= {f"{direction}_recall@{k}": np.mean(np.array(ranks) <= k) for k in (1, 5, 10)}
        found[f"{direction}_median_rank"] = np.median(ranks)
    return found


def drawn(images, texts, dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    owners = torch.randint(images, (texts,), generator=generator)
    image_embeds = torch.randn(images, dim, generator=generator, dtype=dtype)
    noise = torch.randn(texts, dim, generator=generator, dtype=dtype)
    return image_embeds, image_embeds[owners] + 1.5 * noise, owners


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_ranks_and_loss_are_those_of_all_similarities(dtype, chunk_size):
    images, texts, owners = drawn(40, 70, dtype=dtype)
    assert len(owners.unique()) < 40  # some images have no text, most that have one have several
    found = retrieval_metrics(images, texts, owners, scale=20.0, chunk_size=chunk_size)
    expected = by_brute_force(images, texts, owners, 20.0)
    assert found.keys() == expected.keys() and 0.1 < found["text_to_image_recall@1"] < 0.9
    assert found == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-5)
    without = retrieval_metrics(images.numpy(), texts.double(), owners.tolist(), chunk_size=chunk_size)
    assert without == {name: value for name, value in found.items() if name != "loss"}


def test_one_of_several_texts_is_enough_and_each_text_has_one_image():
    texts = torch.tensor([[1.0, 0.0], [-0.9, 1.0], [0.0, 1.0]])  # the second is nearer to the other image
    found = retrieval_metrics(torch.eye(2), texts, [0, 0, 1])
    assert found["image_to_text_recall@1"] == 1 and found["image_to_text_median_rank"] == 1
    assert found["text_to_image_recall@1"] == pytest.approx(2 / 3) and found["text_to_image_recall@5"] == 1


def test_a_wrong_answer_as_similar_comes_first_and_a_right_one_does_not():
    alike = torch.tensor([[1.0, 0.0]])
    found = retrieval_metrics(alike.repeat(3, 1), alike.repeat(6, 1), [0, 0, 1, 1, 2, 2])
    assert found["image_to_text_median_rank"] == 5 and found["text_to_image_median_rank"] == 3
    assert found["image_to_text_recall@1"] == found["text_to_image_recall@1"] == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 25), st.randoms(use_true_random=False))
def test_neither_chunks_nor_order_nor_ties_matter(images, texts, chunk_size, random):
    """Of few directions, in float32, so that many similarities are equal but for rounding."""
    directions = torch.randn(4, 33, generator=torch.Generator().manual_seed(0))
    image_embeds = directions[[random.randrange(4) for _ in range(images)]]
    text_embeds = directions[[random.randrange(4) for _ in range(texts)]]
    owners = torch.tensor([random.randrange(images) for _ in range(texts)])
    found = retrieval_metrics(image_embeds, text_embeds, owners, scale=100.0, chunk_size=chunk_size)
    assert found == pytest.approx(by_brute_force(image_embeds, text_embeds, owners, 100.0), rel=1e-4, abs=1e-4)
    image_order = torch.tensor(random.sample(range(images), images))
    text_order = torch.tensor(random.sample(range(texts), texts))
    shuffled = image_embeds[image_order], 3 * text_embeds[text_order], image_order.argsort()[owners[text_order]]
    again = retrieval_metrics(*shuffled, scale=100.0)
    assert again == pytest.approx(found, rel=1e-5, abs=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers that a result of an operation has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.numbers = max(self.numbers, result.numel() if isinstance(result, torch.Tensor) else 0)
        return result


def test_no_more_similarities_are_held_than_chunks_have():
    images, texts, owners = drawn(100, 200, dim=4)
    with Largest() as largest:
        retrieval_metrics(images, texts, owners, scale=20.0, chunk_size=30)
    assert largest.numbers == 30 * 30  # the embeddings are 800


def test_half_precision_is_compared_in_float32():
    images, texts, owners = drawn(30, 60, dim=32)
    half = images.bfloat16(), texts.bfloat16()
    assert retrieval_metrics(*half, owners, 50.0) == retrieval_metrics(*(x.float() for x in half), owners, 50.0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"image_embeds": torch.zeros(0, 2)}, DataError, "not embeddings.*image_embeds.*at least one row"),
        ({"text_embeds": torch.ones(3)}, DataError, "not embeddings.*text_embeds"),
        ({"text_embeds": torch.ones(3, 4)}, DataError, r"do not fit.*\(3, 4\)"),
        ({"image_embeds": torch.ones(2, 2).long()}, DataError, "not embeddings.*int64"),
        ({"image_embeds": torch.tensor([[1.0, 0], [0, 0]])}, DataError, "no direction.*image_embeds, row 1"),
        ({"text_embeds": torch.full((3, 2), torch.nan)}, NonFiniteError, "NaN.*text_embeds, row 0"),
        ({"image_of_text": [0, 1]}, DataError, r"do not fit the texts.*\(2,\).*\(3,\) integers"),
        ({"image_of_text": [0.0, 1.0, 1.0]}, DataError, "do not fit the texts.*float"),
        ({"image_of_text": [0, 1, 2]}, DataError, "image is none.*got 2; allowed 0 to 1"),
        ({"image_of_text": [0, -1, 1]}, DataError, "image is none.*got -1"),
        ({"scale": float("nan")}, ConfigError, "scale is out of range.*nan"),
        ({"chunk_size": 0}, ConfigError, "chunk_size is out of range: got 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(changed, error, message):
    fitting = {"image_embeds": torch.eye(2), "text_embeds": torch.eye(2)[[0, 1, 1]], "image_of_text": [0, 1, 1]}
    with pytest.raises(error, match=message):
        retrieval_metrics(**fitting | changed)


def test_texts_that_say_the_same_are_right_for_all_their_images():
    generator = torch.Generator().manual_seed(3)
    images, texts = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 4))
    captions = [[str(number % 4), str((number + 1) % 4)] if number < 3 else [str(number % 4)] for number in range(9)]
    different, owners, labels = distinct_texts(captions)
    assert different == ["0", "1", "2", "3"]
    found = retrieval_metrics(images, texts, owners, 5.0, chunk_size=2, text_of_pair=labels)
    similar = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T  # (images, texts)
    right = torch.zeros(9, 4, dtype=torch.bool)
    right[owners, labels] = True
    for direction, scores, own in (("image_to_text", similar, right), ("text_to_image", similar.T, right.T)):
        ranks = [1 + int((s[~o] >= s[o].max()).sum()) for s, o in zip(scores, own, strict=True)]
        assert found[f"{direction}_recall@1"] == sum(rank == 1 for rank in ranks) / len(ranks)
        assert found[f"{direction}_median_rank"] == torch.tensor(ranks).double().quantile(0.5)
    parts = [-(5 * s).log_softmax(0)[o].mean() for s, o in zip([*similar], [*right], strict=True)]
    others = [-(5 * s).log_softmax(0)[o].mean() for s, o in zip([*similar.T], [*right.T], strict=True)]
    assert found["loss"] == pytest.approx(float(sum(parts) / 9 + sum(others) / 4) / 2, abs=1e-12)


def test_a_text_without_an_image_is_refused():
    with pytest.raises(DataError, match="texts without an image.*got 1"):
        retrieval_metrics(torch.eye(2), torch.eye(2), [0, 1], text_of_pair=[0, 0])
