"""Whether a checkpoint still is what was saved: the manifest and its checksums.

`manifest.json` names every other file of a checkpoint with its size and SHA-256, and ends with a digest of itself. It
is checked by writing it down again: the bytes must be the same, so that one changed byte, even of white space, is seen.
Checksums find damage, not malice: who can change a file can change its checksum. What a hostile file could do is
limited elsewhere, by never executing what it pickles (`megadiff.records`, `megadiff.training.state`).

The sources of megadiff have a digest, too: one version number may stand for many checkouts.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypedDict

MANIFEST_NAME = "manifest.json"
_FILES, _DIGEST = "files", "manifest_sha256"


class FileDigest(TypedDict):
    """What a manifest says about one file."""

    bytes: int
    sha256: str


def digest_of(path: Path) -> FileDigest:
    """Size and SHA-256 of a file as it is now."""
    with path.open("rb") as stream:
        sha256 = hashlib.sha256()
        while chunk := stream.read(1 << 22):
            sha256.update(chunk)
        return {"bytes": stream.tell(), "sha256": sha256.hexdigest()}


def write_synced(path: Path, content: bytes) -> FileDigest:
    """Write a file so that it survives a power cut; returns what a manifest says about it."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def replace_text(path: Path, text: str) -> None:
    """Write a small file anew so that nobody ever reads half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(checkpoint: Path, content: dict[str, Any], files: dict[str, FileDigest]) -> None:
    """Seal a checkpoint.

    Args:
        content: What identifies it, JSON-able.
        files: All other files by path relative to the checkpoint.
    """
    write_synced(checkpoint / MANIFEST_NAME, _encode({**content, _FILES: dict(sorted(files.items()))}))


def _encode(content: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, _DIGEST: digest}, indent=2).encode() + b"\n"


def read_manifest(checkpoint: Path, *, verify: bool = True) -> dict[str, Any]:
    """The manifest of a checkpoint, its list of files included.

    Older versions wrote neither the list nor the digest; a manifest with one of them must be right.

    Args:
        verify: Refuse one that does not agree with its own digest.

    Raises:
        ValueError: It is absent, unreadable or, with `verify`, not as it was written.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        written = path.read_bytes()
        content = json.loads(written)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, expected a mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): use another checkpoint") from error
    has_digest = content.pop(_DIGEST, None) is not None
    if verify and (has_digest or _FILES in content) and _encode(content) != written:
        raise ValueError(f"{path} is damaged (it does not have its own SHA-256): use another checkpoint")
    return content


def has_checksums(manifest: dict[str, Any]) -> bool:
    """Whether the checkpoint was written with checksums, so that `damage` can tell anything."""
    return _FILES in manifest


def damage(checkpoint: Path, manifest: dict[str, Any], *, part: int = 0, num_parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint: a few words for each damaged file, nothing if there is none.

    Args:
        manifest: As `read_manifest` returned it.
        part, num_parts: Of several processes that share the work, which one this is; the largest files are dealt first.
    """
    files: dict[str, FileDigest] = manifest.get(_FILES, {})
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    found = []
    for name in by_size[part::num_parts]:
        expected = files[name]
        try:
            size = (checkpoint / name).stat().st_size
            if size != expected["bytes"]:
                found.append(f"{name} has {size} bytes instead of {expected['bytes']}")
            elif digest_of(checkpoint / name) != expected:
                found.append(f"{name} does not have its SHA-256")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def sources_digest() -> str:
    """Hash of the package's Python files, as this process imports them; 16 hexadecimal digits."""
    folder = Path(__file__).parent
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        whole.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return whole.hexdigest()[:16]
