"""Read the table of contents of a distributed checkpoint without running what is pickled in it.

`.metadata` of a torch.distributed.checkpoint folder is a pickle, and a pickle is a program: it names functions and
calls them. The unpickler below knows torch's own plain records (dataclasses, enumerations, sizes, dtypes) and nothing
else. Whatever another name refers to is never imported.
"""

from __future__ import annotations

import pickle
from dataclasses import is_dataclass
from enum import Enum
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

_RECORD_MODULES = frozenset(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner"))


def load_metadata(file: IO[bytes], *, refuse_unknown: bool) -> Metadata:
    """Read the content of a `.metadata` file.

    Args:
        refuse_unknown: What to do about a class that is not torch's plain record: refuse the file, which proves that
            an ordinary unpickler may open it, too; or put an inert placeholder in its place and go on.

    Raises:
        pickle.UnpicklingError: An unknown class, where refused, or the content is something else than Metadata.
        Exception: A damaged pickle raises almost anything.
    """
    metadata = (_RefusingUnpickler if refuse_unknown else _TolerantUnpickler)(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}, expected torch's Metadata")
    return metadata


class _Placeholder:
    """Stands for an object of a class that is not torch's: accepts any content and does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _TolerantUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return self._enum_member
        if (module in _RECORD_MODULES or module == "torch") and "." not in name:
            found = super().find_class(module, name)
            if found is torch.Size or isinstance(found, torch.dtype):
                return found
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum)):
                return found
        return self._unknown(f"{module}.{name}")

    def _enum_member(self, owner: Any, name: str) -> Any:
        """What `getattr` is for in a record: Python 3.11.0 to 3.11.3 write members of enumerations by it."""
        if isinstance(owner, type) and issubclass(owner, Enum):
            return owner[name]
        return self._unknown(f"getattr(…, {name!r})")()

    def _unknown(self, name: str) -> Any:
        return _Placeholder


class _RefusingUnpickler(_TolerantUnpickler):
    def _unknown(self, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {name}, which is no record of torch.distributed.checkpoint")
