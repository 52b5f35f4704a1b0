# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from datasets import Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_robust.data.sources import load_source
from hf_robust.errors import DataError

HEADER = {".csv": "image,label\n", ".tsv": "image\tlabel\n"}
PATH_COLUMNS = ["image", "file_name", "filename", "path", "filepath", "image_path", "img", "file"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder `d` with images that cannot be opened."""
    monkeypatch.chdir(tmp_path)
    for name in ("0.jpg", "1.jpg", "2.jpg"):
        Path("d/images").mkdir(parents=True, exist_ok=True)
        Path("d/images", name).write_text("no picture")
    return tmp_path


def text(suffix, rows):
    """Rows of a path and a label as a file's content."""
    if suffix in HEADER:
        return HEADER[suffix] + "".join(f"{image}{HEADER[suffix][5]}{label}\n" for image, label in rows)
    return "".join(json.dumps({"image": image, "label": label}) + "\n" for image, label in rows)


def write(file, content):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".CSV"])
def test_tables_name_images_and_labels(folder, suffix, bom):
    rows = [("images/0.jpg", "NA"), (str(folder / "d/images/1.jpg"), "None"), ("../d/images/2.jpg", "größer")]
    write(f"d/labels{suffix}", bom + text(suffix.lower(), rows).encode())
    for source in (f"d/labels{suffix}", f"d/*{suffix}", "d"):
        dataset = load_source(source)
        assert dataset.features["image"] == Image(decode=False) and dataset["label"][:] == ["NA", "None", "größer"]
        assert [Path(row["path"]).resolve() for row in dataset["image"]] == [
            folder / f"d/images/{i}.jpg" for i in (0, 1, 2)
        ]
        assert all(Path(row["path"]).is_absolute() for row in dataset["image"])


@pytest.mark.parametrize("files", [["train", "test"], ["train-00000-of-00001", "test"], ["training/0", "test/0"]])
def test_splits_of_tables(files):
    for file in files:
        write(f"t/{file}.csv", "label\n" + file)
    assert load_source("t:train")["label"][:] == files[:1] and load_source("t:test")["label"][:] == files[1:]
    with pytest.raises(DataError, match="source has several splits .*Write 't:train"):
        load_source("t")


def test_tables_beside_their_images():
    """As competitions are distributed: folders of images that are named by splits, and a table for each."""
    for split in ("train", "test"):
        write(f"k/{split}/0.jpg", "no picture")
        write(f"k/{split}.csv", f"file,label\n{split}/0.jpg,cat\n")
    assert load_source("k:test")["image"][0]["path"].endswith("k/test/0.jpg")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\n0\n10\n-3\n", [0, 10, -3]),
        ("a\n0.5\n1\n-2.25\n", [0.5, 1.0, -2.25]),
        ("a\n007\n010\n", ["007", "010"]),
        ("a\n1e5\n2e5\n", ["1e5", "2e5"]),
        ("a\n1\nNA\n", ["1", "NA"]),
        ("a,b\n1,x\n,y\n", ["1", ""]),
        ("a\nnan\ninf\n", ["nan", "inf"]),
        ("a\nTrue\nfalse\n", ["True", "false"]),
        ("a\n2020-01-01\n", ["2020-01-01"]),
        ("a\n12345678901234567890\n", ["12345678901234567890"]),
        ('a\n"x, ""y""\nz"\n\nlast', ['x, "y"\nz', "last"]),
        ("a,b\r\n1,2\r\n", [1]),
        ('a\n"x\r\ny"\n', ["x\r\ny"]),
    ],
)
def test_values_of_csv(content, expected):
    write("a.csv", content)
    assert load_source("a.csv")["a"][:] == expected


def test_values_of_json_lines():
    write("a.jsonl", '{"b": "1"}\n{"a": 2, "b": "2"}\n')
    assert load_source("a.jsonl")[:] == {"b": ["1", "2"], "a": [None, 2]}


# what a spreadsheet can hold; csv itself cannot tell an empty line from an empty field
cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=4), st.sampled_from([".csv", ".tsv", ".jsonl"]))
def test_text_stays_the_text_it_was(rows, suffix):
    with TemporaryDirectory() as folder, open(f"{folder}/a{suffix}", "w", encoding="utf-8", newline="") as file:
        if suffix == ".jsonl":
            file.writelines(json.dumps({"a": a, "b": b}) + "\n" for a, b in rows)
        else:
            csv.writer(file, delimiter=HEADER[suffix][5], quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
        file.close()
        dataset = load_source(f"{folder}/a{suffix}")
        for name, column in zip("ab", zip(*rows, strict=True), strict=True):
            if dataset.features[name] == Value("string"):
                assert dataset[name][:] == list(column)
            else:
                assert all(float(text) == value for text, value in zip(column, dataset[name], strict=True))
                assert all(re.fullmatch(r"-?\d+(\.\d+)?", text) for text in column)


@pytest.mark.parametrize("column", PATH_COLUMNS)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_names_of_the_column_of_paths(column, suffix):
    write(f"d/a{suffix}", text(suffix, [("images/0.jpg", 1)]).replace("image", column, 1))
    dataset = load_source(f"d/a{suffix}")
    assert dataset.column_names == ["image", "label"] and dataset["image"][0]["path"].endswith("images/0.jpg")


@pytest.mark.parametrize(
    ("file", "content", "columns"),
    [
        ("d/a.csv", "img,file\n3,images/0.jpg\n", {"img": "int64", "file": "string"}),
        ("d/a.csv", "image,label\n3,x\n", {"image": "int64", "label": "string"}),
        ("d/a.csv", "photo,label\nimages/0.jpg,x\n", {"photo": "string", "label": "string"}),
        ("d/a.csv", "Image\nimages/0.jpg\n", {"Image": "string"}),
        ("d/a.jsonl", '{"image": null, "label": "x"}', {"image": "null", "label": "string"}),
    ],
)
def test_columns_are_left_alone_unless_exactly_one_is_a_path(file, content, columns):
    write(file, content)
    assert {name: feature.dtype for name, feature in load_source(file).features.items()} == columns


def test_two_columns_of_paths_are_refused():
    write("d/a.csv", "path,image\nimages/0.jpg,images/0.jpg\n")
    with pytest.raises(DataError, match=r"several columns could hold paths.*a.csv.*\['image', 'path'\]"):
        load_source("d/a.csv")


def test_metadata_has_its_own_column_of_paths():
    write("d/metadata.csv", "file_name,path,label\nimages/1.jpg,raw/1.cr2,x\n")
    dataset = load_source("d")
    assert dataset["image"][0]["path"].endswith("d/images/1.jpg") and dataset["path"][:] == ["raw/1.cr2"]


def test_several_tables_are_one_set():
    write("d/a/part-0.csv", "label,file\n1,../images/0.jpg\n")
    write("d/a/part-1.csv", "file,label\n../images/1.jpg,x\n")
    dataset = load_source("d/a")
    assert dataset["label"][:] == ["1", "x"]  # text, as one of them is
    assert [Path(row["path"]).name for row in dataset["image"]] == ["0.jpg", "1.jpg"]
    write("d/b/0.jsonl", '{"label": null, "n": 1}\n{"n": 2, "label": "x"}\n\n{"n": 3}\n')
    write("d/b/1.jsonl", '{"n": null, "label": null}\n')
    assert load_source("d/b")[:] == {"label": [None, "x", None, None], "n": [1, 2, 3, None]}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (["a,b\n1,2\n", "a,b\n1\n"], "line 2 has 1 fields.* .at data.: got 't/1.csv'"),
        (["a,b\n", "a,c\n"], r"files have different columns .at t/0.csv, t/1.csv.: got \['b', 'c'\]"),
        (['{"a": 1}\n', '{"a": "x"}\n'], "files have different columns .*int64.*at t/0.jsonl, t/1.jsonl"),
        (["image\n", "image\n../d/images/0.jpg\n../x.jpg\n"], "no such image .at t/1.csv, row 1.: got '../x.jpg'"),
    ],
)
def test_tables_that_do_not_fit_are_refused(contents, message):
    for index, content in enumerate(contents):
        write(f"t/{index}.{'jsonl' if content[0] == '{' else 'csv'}", content)
    with pytest.raises(DataError, match=message):
        load_source("t", "data")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "d/a.csv",
            "image\nimages/0.jpg\n\nx.jpg\n",
            "image .at d/a.csv, row 1.: got 'x.jpg'; allowed a file: /.*/d/x.jpg",
        ),
        ("d/a.csv", "image,b\n,1\n", "no such image .at d/a.csv, row 0.: got 'no path'"),
        ("d/a.csv", "image\nimages\n", "no such image .at d/a.csv, row 0.: got 'images'"),
        ("d/a.csv", "image\n~/0.jpg\n", "image .at d/a.csv, row 0.: got '~/0.jpg'; allowed a file: /.*/d/~/0.jpg"),
        ("d/a.jsonl", '{"image": "images/0.jpg"}\n{"b": 1}\n', "no such image .at d/a.jsonl, row 1.: got 'no path'"),
        (
            "d/a.csv",
            "image\nhttps://a.org/0.jpg\n",
            "not on this machine .at d/a.csv, row 0.: got 'https://a.*Download",
        ),
        ("d/a.csv", "image\ns3://a/0.jpg\n", "not on this machine"),
        ("d/a.csv", "a,b\n1,2\n3\n", "line 3 has 1 fields, the first line 2. .at data.: got 'd/a.csv'"),
        ("d/a.csv", "a,b\n1,2\n3,4,5\n", "line 3 has 3 fields"),
        ("d/a.csv", 'a,b\n1,"2\n3,4\n', "read .Error: unexpected end of data. .at data.: got 'd/a.csv'"),
        ("d/a.csv", "a,b,a\n1,2,3\n", "column 'a' occurs twice"),
        ("d/a.csv", "", "file is empty"),
        ("d/a.csv", "image,label\n", "dataset is empty .at data.: got 'd/a.csv'; allowed at least one row"),
        ("d/a.csv", "größe\n1\n".encode("latin-1"), "UnicodeDecodeError"),
        ("d/a.tsv", "a\tb\n1,2\n", "line 2 has 1 fields"),
        ("d/a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is no JSON object: "),
        ("d/a.json", '[{"a": 1}]', "line 1 is no JSON object, but list; write one.* .at data.: got 'd/a.json'"),
        ("d/a.json", '{\n"a": 1\n}', "line 1 is no JSON object"),
        ("d/a.jsonl", '{"a": 1}\n{"a": "x"}', "source cannot be read .Arrow.*got 'd/a.jsonl'"),
        ("d/a.jsonl", '{"a": 1' + 40 * "0" + "}", "source cannot be read .*got 'd/a.jsonl'"),
        ("d/a.jsonl", "\n", "file is empty"),
    ],
)
def test_broken_tables_are_refused(file, content, message):
    write(file, content)
    with pytest.raises(DataError, match=message):
        load_source(file, "data")
