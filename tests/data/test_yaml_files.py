# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from hf_robust.data.yaml_files import LIMIT, parse_yaml, read_yaml
from hf_robust.errors import ConfigError, UnsafeFileError


def test_settings_are_read(tmp_path):
    text = "a: {b: [1, 2.5, 1e-3, .inf], c: null}\nd:\n- x: yes\n  'y': |\n    two\n    lines\n1: 2\n"
    (tmp_path / "a.yaml").write_text("\ufeff" + text, encoding="utf-8")
    expected = {"a": {"b": [1, 2.5, "1e-3", float("inf")], "c": None}, "d": [{"x": True, "y": "two\nlines\n"}], 1: 2}
    assert read_yaml(tmp_path / "a.yaml") == expected


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
REFUSED = {
    "bomb": (BOMB, "anchors and aliases"),
    "anchor": ("a: &x 1", "anchors and aliases"),
    "alias": ("a: *x", "anchors and aliases"),
    "tag": ("a: !!python/object/apply:os.getcwd []", "tags"),
    "tag of a name": ("!x a: 1", "tags"),
    "brackets": ("[" * 100_000, "more than 20 lists and mappings"),
    "lists": ("- " * 100_000, "more than 20 lists and mappings"),
    "twice": ("a: {b: 1, c: 2, b: 3}", "'b' stands there twice"),
    "a list as a name": ("? [a]\n: 1", "no name of a setting"),
    "base 60": ("a: 1" + ":1" * 100_000, "a number with 200001 digits"),
    "digits": ("a: 0x" + "9" * 100_000, "a number with 100002 digits"),
    "a day that is none": ("a: 2001-13-32", "month must be in 1..12"),
    "no YAML": ("a: [", "while parsing a flow node"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_settings_do_not_need_is_refused_at_once(text, message):
    with pytest.raises(ConfigError, match=f"file is no YAML .*{message}.* .at my.yaml"):
        parse_yaml(text, "my.yaml")


def test_large_files_and_what_is_no_file_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("#" * (LIMIT + 1))
    with pytest.raises(ConfigError, match="too large"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(UnsafeFileError, match="not a regular file"):
        read_yaml(tmp_path)
