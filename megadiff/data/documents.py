"""Where documents come from: the Python standard library, files, folders, and `.jsonl` files.

A source is iterated as often as needed (to measure, to train a tokenizer, to encode) and yields documents
one by one in a fixed order, as raw bytes: nothing is decoded, so nothing can be lost here.

A document is a tuple of parts: a text has one, an example to learn from has prompts and responses in turn.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Document = tuple[bytes, ...]
"""Parts of text, one after another."""

STANDARD_LIBRARY_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
"""Folders of the standard library that are tests, or not of the standard library."""


class DocumentSource:
    """The documents behind `--input`: each file is one, and each line of a `.jsonl` file.

    Folders are walked recursively, in the order of their relative paths. In them, hidden files and folders
    are skipped; anywhere, empty documents and binary files, known by a zero byte.

    Args:
        inputs: Files and folders; none means the sources of the Python standard library, without its tests.
        text_key: Field of a `.jsonl` line that holds the text.
        leave_out: A folder not to walk into: where the corpus is written.
        read_example: Turns what a `.jsonl` line holds into a document, or raises ValueError; other files are skipped.
            None: documents are texts.

    Raises:
        ValueError: If an input does not exist, or no standard library is found.
    """

    def __init__(
        self,
        inputs: tuple[str, ...] = (),
        text_key: str = "text",
        leave_out: Path | None = None,
        *,
        read_example: Callable[[Any], Document] | None = None,
    ) -> None:
        self._text_key = text_key
        self._read_example = read_example
        self._leave_out = leave_out and leave_out.resolve()
        self._skipped_files = Counter[str]()
        self._skipped_contents = Counter[str]()
        self.paths = [path for name in inputs for path in self._files(Path(name))] if inputs else _standard_library()

    @property
    def skipped(self) -> dict[str, int]:
        """Number of things skipped, by reason, as of the last iteration."""
        return {**self._skipped_files, **self._skipped_contents}

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents, none of them empty.

        Raises:
            ValueError: If a line of a `.jsonl` file is not an object with what it should hold; names file and line
                number.
        """
        self._skipped_contents.clear()
        for path in self.paths:
            for document in self._documents(path):
                if any(document):
                    yield document
                else:
                    self._skipped_contents["empty"] += 1

    def _documents(self, path: Path) -> Iterator[Document]:
        """Yield the documents of a file."""
        if path.suffix == ".jsonl":
            yield from _json_lines(path, self._read_example or self._read_text)
        elif self._read_example is not None:
            self._skipped_contents["not .jsonl"] += 1
        elif b"\0" in (text := path.read_bytes()):
            self._skipped_contents["binary"] += 1
        else:
            yield (text,)

    def _read_text(self, record: Any) -> Document:
        """Return the text that a line of a `.jsonl` file holds."""
        key = self._text_key
        if not isinstance(record, dict) or key not in record:
            got = f"the fields {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise ValueError(
                f"expected an object with the field {key!r}, got {got}; mend the line or name the field with "
                "--text-key."
            )
        text = record[key]
        if not isinstance(text, str):
            raise ValueError(
                f"expected a string in the field {key!r}, got a {type(text).__name__}; mend or remove the line."
            )
        return (utf8(text),)

    def _files(self, path: Path) -> list[Path]:
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise ValueError(f"input {path} is neither a file nor a folder; give --input existing files or folders.")
        files = []
        for folder, folders, names in os.walk(path):
            self._skipped_files["hidden"] += sum(name.startswith(".") for name in [*folders, *names])
            folders[:] = [
                name for name in folders if not name.startswith(".") and Path(folder, name).resolve() != self._leave_out
            ]
            visible = [Path(folder, name) for name in names if not name.startswith(".")]
            files += [file for file in visible if file.is_file()]  # no broken links, pipes or sockets
        return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _standard_library() -> list[Path]:
    """Python files of the running interpreter's standard library, in the order of their relative paths.

    What differs from machine to machine (build settings, site customisation) is left out, so that one
    Python version gives one corpus.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in root.rglob("*.py"):
        *folders, name = path.relative_to(root).parts
        of_this_machine = name.startswith(("_sysconfigdata", "sitecustomize")) or any(
            folder.startswith("config-") for folder in folders
        )
        if not of_this_machine and STANDARD_LIBRARY_LEFT_OUT.isdisjoint(folders):
            files.append(path)
    if not files:
        raise ValueError(
            f"the default corpus, the Python standard library, has no sources in {root}; "
            "give --input with files or folders of text."
        )
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _json_lines(path: Path, read: Callable[[Any], Document]) -> Iterator[Document]:
    """Yield the document of each line of a `.jsonl` file; blank lines are passed over."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}); mend or remove the line.") from error
            try:
                yield read(record)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def document_size(document: Document) -> int:
    """Return the number of bytes of the document's text."""
    return sum(map(len, document))


def utf8(text: str) -> bytes:
    """Return the bytes of a string that JSON gave; a lone surrogate, which is not UTF-8, keeps its three bytes."""
    return text.encode("utf-8", "surrogatepass")
