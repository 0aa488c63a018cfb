"""What counts as a document, and in which order."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from megadiff.data.documents import DocumentSource


def test_default_corpus_is_the_standard_library_without_tests() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root).as_posix() for path in DocumentSource().paths]
    assert names == sorted(names) and len(names) == len(set(names))
    assert {"json/decoder.py", "asyncio/events.py", "typing.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    left_out = (
        "test/",
        "site-packages/",
        "_sysconfigdata",
        "unittest/test/",
        "idlelib/idle_test/",
        "config-",
    )
    assert not [name for name in names if name.startswith(left_out) or "/tests/" in name]


def test_no_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"has no sources in .*; give --input"):
        DocumentSource()


def test_folders_are_walked_in_order_and_skips_are_counted(tmp_path: Path) -> None:
    contents = {
        "b.txt": b"second",
        "a/z.md": b"first \xff\xfe not UTF-8",
        "c/empty.txt": b"",
        "c/picture.png": b"\x89PNG\0",
        "c/deep/d.txt": b"third",
        ".hidden/x.txt": b"hidden",
        "c/.hidden.txt": b"hidden",
        "out/train.bin": b"the corpus itself",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "broken-link").symlink_to(tmp_path / "nowhere")

    source = DocumentSource((str(tmp_path),), leave_out=tmp_path / "a" / ".." / "out")
    for _ in range(2):  # a source is iterated more than once
        assert list(source) == [(b"first \xff\xfe not UTF-8",), (b"second",), (b"third",)]
        assert source.skipped == {"hidden": 2, "empty": 1, "binary": 1}

    named = DocumentSource((str(tmp_path / "c/.hidden.txt"), str(tmp_path / "b.txt")))
    assert list(named) == [(b"hidden",), (b"second",)], "files that are named are read, in the order of naming"


def test_missing_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent is neither a file nor a folder"):
        DocumentSource((str(tmp_path / "absent"),))


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        '{"body": "one\\ntwo"}\n\n{"body": "d\\u00e9j\\u00e0 \\ud800"}\n{"body": ""}\n{"body": "nul \\u0000"}\n'
    )
    source = DocumentSource((str(path),), text_key="body")
    assert list(source) == [(b"one\ntwo",), ("déjà ".encode() + b"\xed\xa0\x80",), (b"nul \0",)]
    assert source.skipped["empty"] == 1


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"text": "\xff"}', "not JSON"),
        (b'"a string"', "expected an object with the field 'text', got a str"),
        (
            b'{"txt": "misnamed", "id": 1}',
            r"expected an object .*, got the fields \['id', 'txt'\]; .* --text-key",
        ),
        (b'{"text": 3}', "expected a string in the field 'text', got a int"),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(json.dumps({"text": "good"}).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"texts.jsonl, line 2: {complaint}"):
        list(DocumentSource((str(path),)))
