# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from datasets import Dataset

from hf_robust.data.readable import readable_rows
from hf_robust.data.rows import labelled_images
from hf_robust.errors import ConfigError, DataError
from tests.tiny_models import image_dataset


def spoiled(bad, n=6):
    """Pictures of which some are broken."""
    table = image_dataset(n, ["a", "b"]).with_format("arrow")[:].to_pylist()
    for row in bad:
        table[row]["image"]["bytes"] = table[row]["image"]["bytes"][:50]
        table[row]["image"]["path"] = f"{row}.png"
    return Dataset.from_list(table, features=image_dataset(1, ["a", "b"]).features)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_without_a_usable_image_are_left_out_and_listed(caplog, workers):
    rows = readable_rows(labelled_images(spoiled([1, 4]), "photos"), workers, silent=True)
    assert rows.numbers.tolist() == [0, 2, 3, 5] and rows.shown_labels.tolist() == [0, 0, 1, 1]
    assert [text.split("(at ")[1] for text in rows.skipped] == ["photos, row 1, 1.png)", "photos, row 4, 4.png)"]
    assert "2 of 6 images are left out" in caplog.text and "4.png" in caplog.text
    assert readable_rows(rows) is rows


def test_good_rows_are_said_to_be_so(caplog):
    rows = readable_rows(labelled_images(spoiled([]), "photos"), silent=True)
    assert len(rows) == 6 and rows.skipped == [] and caplog.text == ""


def test_what_cannot_be_skipped_is_refused():
    with pytest.raises(DataError, match="no image can be used.*photos.*row 0"):
        readable_rows(labelled_images(spoiled(range(6)), "photos"), silent=True)
    with pytest.raises(ConfigError, match="stream cannot be skipped"):
        readable_rows(labelled_images(spoiled([1]).to_iterable_dataset(), "photos"))
