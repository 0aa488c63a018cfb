"""Read a distributed checkpoint in one plain process: no process group, no GPU, no Megatron, no pickled code.

Megatron-Core's `torch_dist` format is a torch.distributed.checkpoint folder: `.metadata` says which byte
range of which `.distcp` file holds which block of which tensor, whatever layout wrote it. Torch reassembles
the blocks; here the folder appears as a mapping whose tensors are read when asked for, so a model larger than
memory can be walked through. `.metadata`, a pickle, is read by `megadiff.records`: a class that it does not know
becomes an inert placeholder, so that the file cannot run code.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megadiff.records import load_metadata


class DistributedCheckpoint(Mapping[str, Tensor]):
    """The tensors of a distributed checkpoint by name, each read whole, in its saved dtype, at every access."""

    def __init__(self, folder: Path, *, ignore: Callable[[str], object], prefix: str = "") -> None:
        """Read the table of contents.

        Args:
            folder: The folder that holds `.metadata` and the `.distcp` files.
            ignore: Tells by name which tensors are left out; what is no tensor always is.
            prefix: Only tensors whose names begin with it are shown, without it, and only these names are asked about.

        Raises:
            ValueError: If the folder holds no readable distributed checkpoint, or one with missing blocks.
        """
        self._folder, self._prefix = folder, prefix
        self._metadata = _read_metadata(folder)
        self._tensors = {
            name.removeprefix(prefix): record
            for name, record in self._metadata.state_dict_metadata.items()
            if isinstance(record, TensorStorageMetadata)
            and name.startswith(prefix)
            and not ignore(name.removeprefix(prefix))
        }
        for name, record in self._tensors.items():
            saved = sum(math.prod(chunk.sizes) for chunk in record.chunks)
            if saved != math.prod(record.size):
                raise ValueError(
                    f"{folder} holds {saved} of the {math.prod(record.size)} elements of {name};"
                    " the checkpoint is incomplete, use another step."
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor; a missing or truncated file is a ValueError that names it."""
        record = self._tensors[name]
        tensor = torch.empty(record.size, dtype=record.properties.dtype)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
                dcp.load(
                    {self._prefix + name: tensor}, storage_reader=_Reader(self._folder, self._metadata), no_dist=True
                )
        except dcp.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise ValueError(
                f"{name} cannot be read from {self._folder} ({type(cause).__name__}: {cause});"
                " the checkpoint is damaged, use another step."
            ) from error
        return tensor


class _Reader(dcp.FileSystemReader):
    """Torch's reader, given the metadata that was read once and with care."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def _read_metadata(folder: Path) -> Metadata:
    path = folder / ".metadata"
    if not path.is_file():
        raise ValueError(
            f"{folder} is no distributed checkpoint: it has no .metadata file; give a folder that has one."
        )
    try:
        with path.open("rb") as file:
            return load_metadata(file, refuse_unknown=False)
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); use another step.") from error
