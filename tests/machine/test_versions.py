"""Versions as they are recorded and compared: with their builds, in every form that torch has them."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from megadiff.machine.versions import OPTIONAL, REQUIRED, major_minor, version, versions


def test_builds_of_one_release_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's metadata is the same for both builds that the default index has had of one release."""
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.13.0")
    found = []
    for build in ("2.13.0+cu126", "2.13.0+cu130"):
        monkeypatch.setattr(torch, "__version__", build)
        found.append(versions()["torch"])
    assert found == ["2.13.0+cu126", "2.13.0+cu130"]


def test_what_is_not_installed_has_no_version() -> None:
    assert version("no-such-package") is None
    assert set(REQUIRED) <= versions().keys() <= {*REQUIRED, *OPTIONAL}
    assert version("megatron_core") == version("Megatron.Core") == versions()["megatron-core"]


@pytest.mark.parametrize(
    "number, expected",
    [
        ("2.13.0+cu130", (2, 13)),
        ("2.10.0a0+b558c986e8.nv25.11", (2, 10)),
        ("2.14.0a0+gitdeadbee", (2, 14)),
        ("2.2.0.dev0+39c0e70", (2, 2)),
        ("13.0", (13, 0)),
        ("3", (3, 0)),
    ],
)
def test_releases_are_compared_by_numbers(number: str, expected: tuple[int, int]) -> None:
    assert major_minor(number) == expected
    assert major_minor("2.9.1") < major_minor("2.10.0a0+b558c986e8.nv25.11")
