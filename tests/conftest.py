"""Fixtures that several rooms share."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real corpus: two packages of the standard library, 400 token ids."""
    from megadiff.data.preprocess import PrepareConfig, prepare

    library = Path(sysconfig.get_paths()["stdlib"])
    directory = tmp_path_factory.mktemp("corpus")
    prepare(
        PrepareConfig(
            input=(str(library / "json"), str(library / "logging")),
            output_dir=directory,
            vocab_size=400,
            validation_fraction=0.2,
        )
    )
    return directory
