# SPDX-License-Identifier: Apache-2.0
"""Tables whose rows name files of images: CSV, TSV and JSON lines."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image

from ..errors import DataError
from .files import reading
from .splits import METADATA
from .text_files import check_regular, parse_json

DELIMITERS, JSON = {".csv": ",", ".tsv": "\t"}, (".jsonl", ".json")
PATH_COLUMNS = ("image", "file_name", "filename", "path", "filepath", "image_path", "img", "file")
INTEGER, NUMBER = r"^-?(0|[1-9]\d{0,17})$", r"^-?(0|[1-9]\d{0,14})(\.\d+)?$"  # 007 and 1e5 are names
URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


def load_tables(files: Sequence[str], where: str) -> Dataset:
    """Loads tables as one dataset.

    A column that only holds integers or decimal numbers is read as such, all others as text, whatever it says. The
    one column named as a path becomes `image`, files that have not been opened.

    Args:
        files: of one kind, by their suffix.
        where: the setting, for the messages.

    Raises:
        DataError: a file cannot be read, has other columns than the first, or names an image that is not there.
        UnsafeFileError: a file is no regular one.
    """
    tables = []
    for file in files:
        with reading(file, where):
            tables.append(_read(file))
    table = _join(files, tables)
    table = table if _suffix(files[0]) in JSON else _numbers(table)
    column = _path_column(table, files[0])
    if column is None:
        return Dataset(table)
    rows = ((file, row) for file, one in zip(files, tables, strict=True) for row in range(one.num_rows))
    paths = [_image_path(*row, value) for row, value in zip(rows, table[column].to_pylist(), strict=True)]
    table = table.set_column(table.column_names.index(column), "image", pa.array(paths, pa.string()))
    return Dataset(table).cast_column("image", Image(decode=False))


def check_same_columns(first: str, expected: Sequence[str], file: str, found: Sequence[str]) -> None:
    """Refuses a file with other columns than the first of its set.

    Args:
        first: the first file.
        expected: its columns.
        file: another one.
        found: likewise.

    Raises:
        DataError: they are not the same; their order may differ.
    """
    different = sorted(set(expected) ^ set(found))
    if different:
        remedy = "Make their columns the same, or name the files that are meant."
        raise DataError("files have different columns", where=f"{first}, {file}", got=different, remedy=remedy)


def _join(files: Sequence[str], tables: Sequence[pa.Table]) -> pa.Table:
    schema = tables[0].schema
    for file, table in zip(files, tables, strict=True):
        check_same_columns(files[0], schema.names, file, table.column_names)
        try:
            schema = pa.unify_schemas([schema, table.schema])  # columns without a single value take any type
        except pa.ArrowException as error:
            where = f"{files[0]}, {file}"
            raise DataError(f"files have different columns ({error})", where=where) from error
    return pa.concat_tables(tables, promote_options="default")


def _numbers(table: pa.Table) -> pa.Table:
    """Columns of text as integers or decimal numbers, where all of a column are such."""
    for index, name in enumerate(table.column_names if len(table) else ()):
        for pattern, kind in ((INTEGER, pa.int64()), (NUMBER, pa.float64())):
            column = table[name]
            if pa.types.is_string(column.type) and pc.all(pc.match_substring_regex(column, pattern)).as_py():
                table = table.set_column(index, name, column.cast(kind))
    return table


def _path_column(table: pa.Table, file: str) -> str | None:
    names = ("file_name", "image") if os.path.basename(file) in METADATA else PATH_COLUMNS
    present = [name for name in names if name in table.column_names]
    paths = [name for name in present if pa.types.is_string(table.schema.field(name).type)]
    if len(paths) > 1:
        raise DataError(
            "several columns could hold paths of images", where=file, got=paths, remedy="Rename all but one."
        )
    return paths[0] if len(present) == 1 and paths else None


def _image_path(table: str, row: int, value: str | None) -> str:
    where = f"{table}, row {row}"
    if value and URL.match(value):
        remedy = "Download the images, and name their files."
        raise DataError("image is not on this machine", where=where, got=value, remedy=remedy)
    path = os.path.join(os.path.dirname(os.path.abspath(table)), value or "")
    if not os.path.isfile(path):
        remedy = "Paths are relative to the folder of the table."
        raise DataError("no such image", where=where, got=value or "no path", allowed=f"a file: {path}", remedy=remedy)
    return path


# --- one file ---


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _read(path: str) -> pa.Table:
    check_regular(path)
    with open(path, encoding="utf-8-sig", newline="") as file:
        return _read_json(file) if _suffix(path) in JSON else _read_csv(file, DELIMITERS[_suffix(path)])


def _read_csv(file: TextIO, delimiter: str) -> pa.Table:
    lines = csv.reader(file, delimiter=delimiter, strict=True)
    names = next(lines, None)
    if not names:
        raise ValueError("file is empty")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"column {twice[0]!r} occurs twice")
    rows = []
    for row in lines:
        if row and len(row) != len(names):
            raise ValueError(f"line {lines.line_num} has {len(row)} fields, the first line {len(names)}")
        rows += [row] if row else []
    columns: Iterable[Sequence[str]] = zip(*rows, strict=True) if rows else [()] * len(names)
    return pa.table({name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)})


def _read_json(file: TextIO) -> pa.Table:
    rows = []
    for number, line in enumerate(file, start=1):
        if line.strip():
            rows.append(_json_object(line, number))
    names = dict.fromkeys(name for row in rows for name in row)
    if not names:
        raise ValueError("file is empty")
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _json_object(line: str, number: int) -> dict[str, Any]:
    try:
        row = parse_json(line, f"line {number}")
    except DataError as error:
        raise ValueError(f"line {number} is no JSON object: {error.got}") from None
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object, but {type(row).__name__}; write one object per line")
    return row
