"""What native libraries are built from, as one number: setup.py compiles it in, loading compares it.

Only the standard library: setup.py runs this file without importing the package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(csrc: Path) -> str | None:
    """Hash of all files of a `csrc/` folder, 16 hexadecimal digits; None where there is no such folder."""
    if not csrc.is_dir():
        return None
    whole = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(csrc)}\n".encode() + path.read_bytes())
    return whole.hexdigest()[:16]
