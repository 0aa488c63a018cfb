"""Everything here runs offline, with transformers' copies of exported code in a throw-away folder."""

from __future__ import annotations

import os
import sysconfig
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 400 pieces trained on one module of the standard library."""
    from megadiff.data.tokenizer import Tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    source = Path(sysconfig.get_paths()["stdlib"]) / "json" / "decoder.py"
    Tokenizer.train([source.read_bytes()], 400, path)
    return path
