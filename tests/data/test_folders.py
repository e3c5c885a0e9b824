"""Folders of texts and of tables, and workbooks."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from lorakit.data.example import Columns
from lorakit.data.read import read
from lorakit.errors import DataError


def fill(folder: Path, files: Mapping[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def records(path: Path, split: str = "train") -> list[tuple[str, object]]:
    return [(example.text, example.label) for example in read(str(path), split=split).examples]


CLASSES = {"neg/1.txt": "dull", "neg/2.txt": "long\nand dull\n", "pos/1.txt": "superb"}
TEXTS = [("dull", "neg"), ("long\nand dull\n", "neg"), ("superb", "pos")]


@pytest.mark.parametrize(
    "rename", [lambda name: name, lambda name: name.removesuffix(".txt")], ids=["txt", "no ending"]
)
def test_class_folders_are_read(tmp_path, rename):
    fill(tmp_path, {rename(name): text for name, text in CLASSES.items()})
    assert records(tmp_path) == TEXTS
    assert f"{tmp_path}: read as folders" in read(str(tmp_path)).notes


def test_class_folders_of_each_split_are_told_apart(tmp_path):
    fill(tmp_path, {f"train/{name}": text for name, text in CLASSES.items()})
    fill(tmp_path, {"test/neg/1.txt": "bad", "test/pos/1.txt": "good"})
    assert records(tmp_path) == TEXTS
    assert records(tmp_path, "test") == [("bad", "neg"), ("good", "pos")]


def test_what_is_no_text_is_counted_aloud(tmp_path):
    fill(tmp_path, {**CLASSES, "pos/a.png": "x"})
    assert records(tmp_path) == TEXTS
    assert f"{tmp_path}: files that are not .txt, not read: 1 (a.png)" in read(str(tmp_path)).notes


def test_hidden_files_are_not_data(tmp_path):
    fill(tmp_path / "a", {**CLASSES, "neg/.DS_Store": "x", "pos/._1.txt": "x", "pos/.1": "x"})
    assert records(tmp_path / "a") == TEXTS
    fill(tmp_path / "b", {"a.csv": "text,label\none,x\n", "._a.csv": "x"})
    assert records(tmp_path / "b") == [("one", "x")]


@pytest.mark.parametrize("content", ["text,label\n{},x\n", "text;label\n{};x\n"])
def test_tables_of_a_folder_are_read_together_and_said(tmp_path, content):
    fill(tmp_path, {"b.csv": content.format("two"), "a.csv": content.format("one"), "README.md": "# no table"})
    assert records(tmp_path) == [("one", "x"), ("two", "x")]
    assert f"{tmp_path}: a.csv, b.csv of the folder" in read(str(tmp_path)).notes


def test_tables_of_a_folder_are_those_of_the_split(tmp_path):
    fill(tmp_path, {f"{name}.csv": f"text,label\n{name},x\n" for name in ("train-1", "train-2", "dev", "TEST")})
    assert records(tmp_path) == [("train-1", "x"), ("train-2", "x")]
    assert records(tmp_path, "validation") == [("dev", "x")]
    assert records(tmp_path, "test") == [("TEST", "x")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"test.csv": "a,b\n"}, ": no file of the split train: test.csv; name one"),
        ({"a.csv": "a,b\n", "b.jsonl": "{}"}, ": tables of several kinds: a.csv, b.jsonl; name one, or a pattern"),
        ({"a.md": "a"}, ": nothing in this folder can be read; expected tables, class folders of .txt,"),
        ({"one/a.txt": "a"}, ": nothing in this folder can be read"),
    ],
)
def test_folder_that_is_unclear_is_refused(tmp_path, files, message):
    with pytest.raises(DataError, match="^" + re.escape(f"{tmp_path}{message}")):
        read(str(fill(tmp_path, files)))


# Workbooks


def workbook(path: Path, sheets: Mapping[str, Sequence[Sequence[object]]]) -> Path:
    """The smallest file that is one: texts and numbers in rows."""

    def cell(value: object) -> str:
        return (
            f"<c><v>{value}</v></c>"
            if isinstance(value, (int, float))
            else f'<c t="inlineStr"><is><t>{value}</t></is></c>'
        )

    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    with zipfile.ZipFile(path, "w") as archive:
        root = f'<Relationship Id="r0" Type="{office}/officeDocument" Target="xl/workbook.xml"/>'
        package = "http://schemas.openxmlformats.org/package/2006/relationships"
        archive.writestr("_rels/.rels", f'<Relationships xmlns="{package}">{root}</Relationships>')
        names = "".join(f'<sheet name="{name}" sheetId="{i}" r:id="r{i}"/>' for i, name in enumerate(sheets, 1))
        archive.writestr(
            "xl/workbook.xml", f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets>{names}</sheets></workbook>'
        )
        relations = "".join(
            f'<Relationship Id="r{i}" Type="{office}/worksheet" Target="worksheets/{i}.xml"/>'
            for i in range(1, len(sheets) + 1)
        )
        archive.writestr("xl/_rels/workbook.xml.rels", f'<Relationships xmlns="{package}">{relations}</Relationships>')
        for i, rows in enumerate(sheets.values(), 1):
            body = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
            archive.writestr(
                f"xl/worksheets/{i}.xml", f'<worksheet xmlns="{main}"><sheetData>{body}</sheetData></worksheet>'
            )
    return path


def test_workbook_is_read_as_its_cells_are_shown(tmp_path):
    pytest.importorskip("python_calamine")
    sheets = {"data": [["text", "stars"], ["a film", 5.0], ["7", 2]], "more": [["x"]]}
    path = workbook(tmp_path / "a.xlsx", sheets)
    dataset = read(str(path))
    assert [(e.text, e.label, e.where) for e in dataset.examples] == [
        ("a film", "5", f"{path}:2"),
        ("7", "2", f"{path}:3"),
    ]
    assert f"{path}: reads sheet 'data', but not more" in dataset.notes
    assert len(read(str(path), columns=Columns(header=False, text="1", label="2")).examples) == 3


def test_file_that_is_no_workbook_is_refused(tmp_path):
    pytest.importorskip("python_calamine")
    (tmp_path / "a.xlsx").write_bytes(b"PK no")
    with pytest.raises(DataError, match=r"a\.xlsx: cannot be read as a workbook: .*; save it as CSV"):
        read(str(tmp_path / "a.xlsx"))
