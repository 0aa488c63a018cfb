"""Windows tile the stream of documents exactly; every damage is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megadiff.data.corpus import Corpus


@pytest.fixture
def copy(corpus_dir: Path, tmp_path: Path) -> Path:
    """A corpus that may be damaged."""
    return Path(shutil.copytree(corpus_dir, tmp_path / "copy"))


@pytest.mark.parametrize("sequence_length", [7, 32, 1000])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_windows_tile_the_stream(corpus_dir: Path, split: str, sequence_length: int) -> None:
    corpus = Corpus.open(corpus_dir)
    stream = corpus.split(split)
    assert stream.num_tokens == getattr(corpus.manifest, split).num_tokens
    num_windows = stream.num_windows(sequence_length)
    windows = [stream.window(index, sequence_length) for index in range(num_windows)]
    assert all(window.shape == (sequence_length,) and window.dtype == np.int64 for window in windows)

    raw = np.fromfile(corpus_dir / f"{split}.bin", dtype=np.uint16)
    assert np.array_equal(np.concatenate(windows), raw[: num_windows * sequence_length])
    assert len(raw) - num_windows * sequence_length < sequence_length


def test_windows_out_of_range(corpus_dir: Path) -> None:
    stream = Corpus.open(corpus_dir).split("validation")
    for sequence_length in (0, stream.num_tokens + 1):
        with pytest.raises(ValueError, match=rf"sequence_length must lie in \[1, .* got {sequence_length};"):
            stream.num_windows(sequence_length)
    assert stream.num_windows(stream.num_tokens) == 1
    for index in (-1, 1):
        with pytest.raises(ValueError, match=rf"window must lie in \[0, 1\) .* got {index};"):
            stream.window(index, stream.num_tokens)


@pytest.mark.parametrize(
    ("split", "remedy"), [("validation", "a larger --validation-fraction"), ("train", "more text")]
)
def test_split_shorter_than_a_sequence(corpus_dir: Path, split: str, remedy: str) -> None:
    stream = Corpus.open(corpus_dir).split(split)
    with pytest.raises(ValueError, match=rf"the tokens of the {split} split, .* run `megadiff prepare` with {remedy}"):
        stream.num_windows(stream.num_tokens + 1)


def test_byte_table_counts_the_bytes_of_text(corpus_dir: Path) -> None:
    corpus = Corpus.open(corpus_dir)
    tokens = torch.from_numpy(corpus.split("train").window(3, 64))
    assert corpus.token_bytes_V[tokens].sum().item() == len(corpus.tokenizer.decode_bytes(tokens)) > 0
    assert corpus.token_bytes_V[corpus.manifest.eos_id].item() == 0


def test_no_such_split(corpus_dir: Path) -> None:
    with pytest.raises(ValueError, match="split must be one of train, validation, got 'test'"):
        Corpus.open(corpus_dir).split("test")


def test_no_corpus(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent is not a folder; run `megadiff prepare --output-dir .*absent`"):
        Corpus.open(tmp_path / "absent")
    for name in ("corpus.json", "token_bytes.npy"):
        (copy / name).rename(tmp_path / "aside")
        with pytest.raises(ValueError, match=rf"has no {name}, .*; run `megadiff prepare"):
            Corpus.open(copy)
        (tmp_path / "aside").rename(copy / name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda manifest: "{",
        lambda manifest: json.dumps([manifest]),
        lambda manifest: json.dumps({**manifest, "surplus": 1}),
        lambda manifest: json.dumps({key: value for key, value in manifest.items() if key != "train"}),
        lambda manifest: json.dumps({key: value for key, value in manifest.items() if key != "mask_id"}),
    ],
)
def test_damaged_manifest(copy: Path, damage: Callable[[dict[str, Any]], str]) -> None:
    path = copy / "corpus.json"
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=r"not a corpus manifest with the fields fingerprint, .*prepare` again"):
        Corpus.open(copy)


def test_damaged_byte_table(copy: Path) -> None:
    path = copy / "token_bytes.npy"
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"token_bytes.npy is damaged \(.+\); run `megadiff prepare` again"):
            Corpus.open(copy)
    np.save(path, np.zeros(7, dtype=np.int32))
    with pytest.raises(ValueError, match=r"has shape \(7,\), expected one number for each of the 400 tokens"):
        Corpus.open(copy)


def test_truncated_tokens(copy: Path) -> None:
    path = copy / "train.bin"
    whole = path.read_bytes()
    for content in (whole[:-2], whole[:-1], b"", whole + b"\0\0"):
        path.write_bytes(content)
        expected = rf"has {len(content)} bytes, but its index counts {len(whole) // 2} tokens, {len(whole)} bytes"
        with pytest.raises(ValueError, match=rf"train.bin {expected}.*run `megadiff prepare` again"):
            Corpus.open(copy).split("train")
    path.unlink()
    with pytest.raises(ValueError, match=r"train.bin is missing; run `megadiff prepare` again"):
        Corpus.open(copy).split("train")


def test_file_cut_short_while_it_is_read(copy: Path) -> None:
    """A mapped file would end the process with SIGBUS here."""
    stream = Corpus.open(copy).split("train")
    kept = stream.window(0, 64)
    os.truncate(copy / "train.bin", 150)  # within the second window
    assert np.array_equal(stream.window(0, 64), kept)
    with pytest.raises(
        ValueError, match=r"train.bin ends within tokens 64 to 127, expected \d+: it was cut short while"
    ):
        stream.window(1, 64)


def test_damaged_index(copy: Path) -> None:
    path = copy / "train.idx"
    whole = path.read_bytes()
    wrong_dtype = whole[:17] + b"\6" + whole[18:]
    for content in (b"", whole[:20], whole[:40], whole[:-8], b"X" + whole[1:], wrong_dtype):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train.idx is damaged \(.+\); run `megadiff prepare` again"):
            Corpus.open(copy).split("train")


def test_empty_split(copy: Path) -> None:
    index = (copy / "train.idx").read_bytes()
    (copy / "train.bin").write_bytes(b"")
    (copy / "train.idx").write_bytes(index[:18] + bytes(16))
    with pytest.raises(ValueError, match=r"train.bin is empty; run `megadiff prepare` again with more text"):
        Corpus.open(copy).split("train")


def test_token_outside_the_vocabulary(copy: Path) -> None:
    path = copy / "train.bin"
    tokens = np.fromfile(path, dtype=np.uint16)
    tokens[100] = 400
    tokens.tofile(path)
    stream = Corpus.open(copy).split("train")
    stream.window(0, 64)
    with pytest.raises(ValueError, match=r"train.bin holds token id 400 near token 64, expected ids in \[0, 400\)"):
        stream.window(1, 64)
