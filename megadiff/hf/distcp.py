"""Read a distributed checkpoint in one plain process: no process group, no GPU, no Megatron, no pickled code.

Megatron-Core's `torch_dist` format is a torch.distributed.checkpoint folder: `.metadata` says which byte
range of which `.distcp` file holds which block of which tensor, whatever layout wrote it. Torch reassembles
the blocks; this file adds two things. The folder appears as a mapping whose tensors are read when asked for,
so a model larger than memory can be walked through. And `.metadata`, a pickle, is read by an unpickler that
builds nothing but torch's own plain records: any other class in it becomes an inert placeholder, so that the
file cannot run code.
"""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_RECORD_MODULES = frozenset(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner"))


class DistributedCheckpoint(Mapping[str, Tensor]):
    """The tensors of a distributed checkpoint by name, each read whole, in its saved dtype, at every access."""

    def __init__(self, folder: Path, *, ignore: Callable[[str], object]) -> None:
        """Read the table of contents.

        Args:
            folder: The folder that holds `.metadata` and the `.distcp` files.
            ignore: Tells by name which tensors are left out; what is no tensor always is.

        Raises:
            ValueError: If the folder holds no readable distributed checkpoint, or one with missing blocks.
        """
        self._folder = folder
        self._metadata = _read_metadata(folder)
        self._tensors = {
            name: record
            for name, record in self._metadata.state_dict_metadata.items()
            if isinstance(record, TensorStorageMetadata) and not ignore(name)
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
                dcp.load({name: tensor}, storage_reader=_Reader(self._folder, self._metadata), no_dist=True)
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
            metadata = _RecordUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); use another step.") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} holds a {type(metadata).__name__}, expected torch's Metadata; use another step.")
    return metadata


class _Placeholder:
    """Stands for an object of a class that is not torch's: accepts any content and does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _enum_member(owner: Any, name: str) -> Any:
    """What `getattr` is for in a record: Python 3.11.0 to 3.11.3 write members of enumerations by it."""
    is_enum = isinstance(owner, type) and issubclass(owner, Enum)
    return owner[name] if is_enum else _Placeholder()


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if module in _RECORD_MODULES or module == "torch":
            found = super().find_class(module, name)
            if found is torch.Size or isinstance(found, torch.dtype):
                return found
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum)):
                return found
        return _Placeholder
