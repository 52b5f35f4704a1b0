# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_robust.cards.push import push
from hf_robust.data.images import load_rgb
from hf_robust.data.sources import load_source
from hf_robust.data.text_files import parse_json, read_json, read_text
from hf_robust.errors import ConfigError, DataError, HfRobustError, HubError, UnsafeFileError
from hf_robust.evaluation import RobustnessSuite
from hf_robust.interpolation.files import read_json as read_object
from hf_robust.scripting.arguments import parse_arguments
from hf_robust.scripting.loading import read_class_names
from hf_robust.training.arguments import RobustTrainingArguments


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2.5, -3e2, true, null], "b": {"a": "ü"}}', b'\xef\xbb\xbf"b"', "[]", " 1 "]
)
def test_json_is_read_as_python_reads_it(tmp_path, text):
    expected = {"[]": [], " 1 ": 1, b'\xef\xbb\xbf"b"': "b"}.get(
        text, {"a": [1, 2.5, -300.0, True, None], "b": {"a": "ü"}}
    )
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "link.json").symlink_to("a.json")  # as in the cache of the Hub
    assert parse_json(text, "a.json") == expected == read_json(tmp_path / "link.json")


REFUSED = {
    "repeated": ('{"a": {"b": 1, "c": 2, "b": 3}}', "'b' is there twice"),
    "repeated in another spelling": ('{"b": 1, "\\u0062": 3}', "'b' is there twice"),
    "nan": ('{"a": NaN}', "NaN is no finite number"),
    "infinity": ("[-Infinity]", "-Infinity is no finite number"),
    "out of range": ("[1e999]", "1e999 is no finite number"),
    "digits": ("[" + "9" * 5000 + "]", "4300"),
    "nested": ("[" * 200_000, "too many brackets within each other"),
    "nested objects": ('{"a":' * 200_000, "too many brackets within each other"),
    "cut off": ('{"a": ', "Expecting value"),
    "no utf-8": (b'["\xff"]', "can't decode byte 0xff"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_json_is_refused(text, message):
    with pytest.raises(DataError, match=f"no valid JSON .at there.json.: got .*{message}"):
        parse_json(text, "there.json")


def test_a_file_with_many_repeated_names_is_refused_at_once():
    text = "{" + ",".join(f'"{index}": 0' for index in range(300_000)) + ', "0": 1}'
    with pytest.raises(DataError, match="'0' is there twice"):
        parse_json(text, "a.json")


def test_files_that_are_missing_too_large_or_no_text_are_refused(tmp_path):
    with pytest.raises(DataError, match="file cannot be read .at .*no.txt.: got 'No such file"):
        read_text(tmp_path / "no.txt")
    (tmp_path / "a.txt").write_text("123456789ü")
    assert read_text(tmp_path / "a.txt", limit=11) == "123456789ü"
    with pytest.raises(ConfigError, match="file is too large .at .*a.txt.: allowed 10 bytes"):
        read_text(tmp_path / "a.txt", limit=10, error=ConfigError)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="no text in UTF-8 .at .*a.txt.: got .*0xff"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "a"
    {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    for read in (read_text, read_json, read_object):
        with pytest.raises(UnsafeFileError, match="not a regular file"):
            read(path)


ENTRANCES = {  # those of the package that read JSON or small text
    "classes": ("names.json", lambda file: read_class_names(str(file))),
    "suite": ("suite.json", lambda file: RobustnessSuite.from_yaml(suite_with(file))),
    "splits": ("saved/dataset_dict.json", lambda file: load_source(str(file.parent))),
    "lines": ("rows.jsonl", lambda file: load_source(str(file))),
    "push": ("adapter/adapter_config.json", lambda file: push(file.parent, "me/adapter")),
    "merge": ("config.json", lambda file: read_object(file)),
}


def suite_with(file):
    path = file.with_suffix(".yaml")
    path.write_text(f"sets:\n  a: {{role: id, source: x, merge_file: {file}}}\n")
    return path


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": NaN}', "[" * 200_000], ids=["twice", "nan", "nested"])
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_is_as_strict(tmp_path, entrance, text):
    name, read = ENTRANCES[entrance]
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    (file.parent / "adapter_model.safetensors").touch()
    with pytest.raises(HfRobustError, match="JSON|is there twice"):
        read(file)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_data_are_read_from_regular_files_alone(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UnsafeFileError, match=f"not a regular file .at .*{name}"):
        load_source(str(tmp_path))


def test_an_image_that_is_a_pipe_is_one_that_cannot_be_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="image cannot be opened .not a regular file"):
        load_rgb(tmp_path / "a.png")


def test_names_one_per_line_are_read_from_regular_files_alone(tmp_path):
    os.mkfifo(tmp_path / "names.txt")
    with pytest.raises(UnsafeFileError):
        read_class_names(str(tmp_path / "names.txt"))
    with pytest.raises(UnsafeFileError):
        parse_arguments([RobustTrainingArguments], flags=["--config", str(tmp_path / "names.txt")])


@pytest.mark.parametrize("text", ["[1]", '{"weight_map": 1}', '{"weight_map": {"a": ["b"]}}'])
def test_a_push_refuses_json_of_another_kind(tmp_path, text):
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises((HubError, UnsafeFileError), match="malformed|index names files that are no shards"):
        push(tmp_path, "me/model")


def test_a_push_reads_the_card_with_the_limits_of_yaml(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    Path(tmp_path, "README.md").write_text("---\na: &x [1]\nb: *x\n---\nText\n")
    with pytest.raises(HubError, match="no YAML .anchors.*nothing has been pushed .at README.md"):
        push(tmp_path, "me/model")
