"""A checkpoint is what was saved, or it is said which file is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megadiff.integrity import damage, digest_of, has_checksums, read_manifest, write_manifest, write_synced

CONTENT: dict[str, Any] = {"step": 4, "validation": {"nelbo": 5.2531, "stderr": float("nan")}, "name": "αβγ"}


def seal(checkpoint: Path) -> dict[str, Any]:
    (checkpoint / "state").mkdir(parents=True)
    files = {
        name: write_synced(checkpoint / name, content)
        for name, content in {"config.yaml": b"model: {}\n", "state/__0_0.distcp": bytes(range(256)) * 100}.items()
    }
    assert all(digest_of(checkpoint / name) == digest for name, digest in files.items())
    write_manifest(checkpoint, CONTENT, files)
    return read_manifest(checkpoint)


def test_manifest_comes_back_with_its_files(tmp_path: Path) -> None:
    manifest = seal(tmp_path / "step")
    assert json.dumps({name: manifest[name] for name in CONTENT}) == json.dumps(CONTENT)
    assert list(manifest["files"]) == ["config.yaml", "state/__0_0.distcp"] and has_checksums(manifest)
    assert damage(tmp_path / "step", manifest) == []


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    seal(tmp_path / "step")
    path = tmp_path / "step" / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (0x01, 0x20, 0x80):
            flipped = bytearray(content)
            flipped[position] ^= bit
            path.write_bytes(flipped)
            with pytest.raises(
                ValueError, match=r"manifest.json (is damaged|cannot be read) .*: use another checkpoint"
            ):
                read_manifest(tmp_path / "step")
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"manifest.json"):
            read_manifest(tmp_path / "step")
    path.write_text("[1]")
    with pytest.raises(ValueError, match="a list, expected a mapping"):
        read_manifest(tmp_path / "step")


def test_damaged_files_are_named_by_whoever_checks_them(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step"
    manifest = seal(checkpoint)
    state = checkpoint / "state" / "__0_0.distcp"
    flipped = bytearray(state.read_bytes())
    flipped[17] ^= 4
    state.write_bytes(flipped)
    (checkpoint / "config.yaml").unlink()
    expected = [
        "state/__0_0.distcp does not have its SHA-256",
        "config.yaml cannot be read (No such file or directory)",
    ]
    assert damage(checkpoint, manifest) == expected
    assert [damage(checkpoint, manifest, part=part, num_parts=3) for part in range(3)] == [*([e] for e in expected), []]
    state.write_bytes(b"")
    assert damage(checkpoint, manifest)[0] == "state/__0_0.distcp has 0 bytes instead of 25600"


def test_manifests_of_older_versions_are_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(CONTENT, indent=2))
    manifest = read_manifest(tmp_path)
    assert manifest["step"] == 4 and not has_checksums(manifest) and damage(tmp_path, manifest) == []
