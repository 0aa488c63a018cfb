"""The shipped tokenizer gives the ids of training and gives back every byte."""

from __future__ import annotations

import json
import pickle
import random
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from transformers import AutoTokenizer

from megadiff.data.tokenizer import Tokenizer
from megadiff.hf import tokenization_megadiff
from megadiff.hf.convert import convert_to_hf
from megadiff.hf.tokenization_megadiff import MegadiffTokenizer

TEXTS = [
    "",
    " ",
    "  leading and trailing  ",
    "def f(x):\n\n\n\treturn x  # tabs\tand  runs   of    spaces\r\n",
    "▁ ▁▁a▁b ▁",
    "naïve café, Ελληνικά, 中文, العربية, 👩‍👩‍👧‍👦, \u200b\ufeff\u2585",
    "<mask></s><s><pad><unk> <0x41> <0xZZ>",
    "\x00\x01\x7f\u0085\u2028",
    "\udcff\udc80 invalid \udce2\udc96 bytes",
    "Ａ ﬁ ① are not normalised",
    "don't clean . up , spaces ?",
]


@pytest.fixture(scope="module")
def trained(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


@pytest.fixture(scope="module")
def shipped(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer as a user gets it."""
    folder = tmp_path_factory.mktemp("export")
    write_checkpoint(folder / "checkpoint", tokenizer=tokenizer_path)
    convert_to_hf(folder / "checkpoint", folder / "exported")
    return AutoTokenizer.from_pretrained(folder / "exported", trust_remote_code=True)


def _ids(tokenizer: MegadiffTokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_same_ids_as_in_training_and_no_byte_lost(trained: Tokenizer, shipped: MegadiffTokenizer, text: str) -> None:
    ids = _ids(shipped, text)
    assert ids == trained.encode(text)
    assert shipped.decode_bytes(ids) == text.encode("utf-8", "surrogateescape")
    assert shipped.decode(ids) == trained.decode(ids)
    if text.isprintable():
        assert shipped.decode(ids) == text


def test_random_text_and_real_files(trained: Tokenizer, shipped: MegadiffTokenizer) -> None:
    rng = random.Random(0)
    alphabet = "  \n\tab<>▁\u0301é中🎉\udc80\udcff\x00"
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(300)]
    texts.append((Path(sysconfig.get_paths()["stdlib"]) / "json" / "encoder.py").read_text(encoding="utf-8"))
    assert len(texts[-1]) > 2 * tokenization_megadiff.SEGMENT_LENGTH - 4000
    texts.append("no line end " * 1500)
    for text in texts:
        ids = _ids(shipped, text)
        assert ids == trained.encode(text)
        assert shipped.decode_bytes(ids) == text.encode("utf-8", "surrogateescape")


def test_special_tokens(trained: Tokenizer, shipped: MegadiffTokenizer) -> None:
    ids = (shipped.bos_token_id, shipped.eos_token_id, shipped.pad_token_id, shipped.mask_token_id)
    assert ids == (trained.bos_id, trained.eos_id, trained.pad_id, trained.mask_id) == (0, 1, 2, 3)
    assert shipped.unk_token_id == trained.unk_id == 4
    assert len(shipped) == shipped.vocab_size == trained.vocab_size == 400
    assert shipped.mask_token == "<mask>"
    mixed = [3, *trained.encode("a b"), 1, 2]
    assert shipped.decode(mixed) == "<mask>a b</s><pad>"
    assert shipped.decode(mixed, skip_special_tokens=True) == "a b" == trained.decode(mixed)
    assert shipped.decode_bytes(mixed) == b"a b"
    assert shipped.decode(3) == "<mask>"
    assert shipped.convert_ids_to_tokens(3) == "<mask>"


def test_masks_are_read_from_text_only_when_asked(trained: Tokenizer, shipped: MegadiffTokenizer) -> None:
    assert 3 not in _ids(shipped, "a <mask> b")
    asked = shipped("a <mask> b", split_special_tokens=False)["input_ids"]
    assert asked == [*trained.encode("a "), 3, *trained.encode(" b")]


def test_batches_are_padded_on_the_left(trained: Tokenizer, shipped: MegadiffTokenizer) -> None:
    batch = shipped(["a", "a longer text"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    length = len(trained.encode("a longer text"))
    assert batch["input_ids"].shape == (2, length)
    assert batch["input_ids"][0].tolist() == [2] * (length - 1) + trained.encode("a")
    assert batch["attention_mask"].sum(-1).tolist() == [1, length]
    assert shipped.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["a", "a longer text"]
    assert shipped("a", "b")["input_ids"] == trained.encode("a") + trained.encode("b")


def test_the_config_file_names_the_special_tokens(shipped: MegadiffTokenizer) -> None:
    config = json.loads((Path(shipped.name_or_path) / "tokenizer_config.json").read_text())
    assert config["mask_token"] == "<mask>" and config["eos_token"] == "</s>" and config["model_max_length"] == 24


def test_copies(shipped: MegadiffTokenizer, tokenizer_path: Path, tmp_path: Path) -> None:
    text = "x ▁ y"
    assert _ids(pickle.loads(pickle.dumps(MegadiffTokenizer(str(tokenizer_path)))), text) == _ids(shipped, text)
    paths = shipped.save_vocabulary(str(tmp_path), filename_prefix="my")
    assert paths == (str(tmp_path / "my-tokenizer.model"),)
    assert Path(*paths).read_bytes() == tokenizer_path.read_bytes()
    folder = Path(shipped.vocab_file).parent
    assert shipped.save_vocabulary(str(folder)) == (shipped.vocab_file,)  # onto itself: left as it is


def test_added_tokens_are_decoded_as_their_names(tokenizer_path: Path) -> None:
    tokenizer = MegadiffTokenizer(str(tokenizer_path), mask_token="<mask>", pad_token="<pad>")
    tokenizer.add_tokens(["<new token>"])
    assert len(tokenizer) == 401
    assert tokenizer.decode([400, *_ids(tokenizer, " a")]) == "<new token> a"
