"""A Transformer Engine that is installed and cannot be imported: hidden from Megatron-Core, which would fail with it.

Megatron-Core takes the package for usable where its outermost module can be imported, as it can where the libraries
within are missing or made for another torch. Its own import ends with theirs then, for whoever trains, on any device.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import Any

_PACKAGE = "transformer_engine"


@functools.cache
def why_broken() -> str:
    """Why the installed package cannot be imported, which it cannot be by anybody from then on; empty where it can.

    Empty, too, where it is not installed.
    """
    if _PACKAGE not in sys.modules and importlib.util.find_spec(_PACKAGE) is None:
        return ""
    try:
        importlib.import_module(f"{_PACKAGE}.pytorch")
    except Exception as error:  # a library built for another torch or CUDA fails in its own way
        for name in [name for name in sys.modules if name.split(".")[0] == _PACKAGE]:
            del sys.modules[name]
        sys.modules[_PACKAGE] = None  # type: ignore[assignment]
        return f"{_PACKAGE}.pytorch fails to import: {' '.join(str(error).split())[:120]}"
    return ""


class _BeforeMegatron(MetaPathFinder):
    """Finds nothing, and asks `why_broken` when somebody is about to import Megatron-Core."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "megatron.core":
            why_broken()


def hide_if_broken() -> None:
    """Let Megatron-Core find a broken package as if it were not installed.

    It is tried when Megatron-Core is first imported: commands that do without either do not wait for them.
    """
    if not any(isinstance(finder, _BeforeMegatron) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeMegatron())
