"""Reading distributed checkpoints in one process, and refusing damaged or hostile ones."""

from __future__ import annotations

import os
import pickle
from enum import Enum
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import Blocks
from torch.distributed.checkpoint.metadata import Metadata

from megadiff.hf.distcp import DistributedCheckpoint


def _ignore_nothing(name: str) -> bool:
    return False


def _save(folder: Path, **content: object) -> Path:
    dcp.save(content, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def _edit_metadata(folder: Path, edit) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(edit(metadata) or metadata))


def test_reads_whole_tensors_from_blocks_in_their_dtype(tmp_path: Path) -> None:
    weight = torch.arange(24.0).reshape(8, 3)
    half = torch.randn(4, 2).bfloat16()
    folder = _save(tmp_path / "state", weight=Blocks.of(weight, 4), half=half, scalar=torch.tensor(3.0), note={"a": 1})
    checkpoint = DistributedCheckpoint(folder, ignore=lambda name: name == "scalar")
    assert set(checkpoint) == {"weight", "half"} and len(checkpoint) == 2
    assert torch.equal(checkpoint["weight"], weight)
    assert checkpoint["half"].dtype == torch.bfloat16 and torch.equal(checkpoint["half"], half)
    with pytest.raises(KeyError):
        checkpoint["scalar"]


def test_reads_what_python_3_11_0_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until 3.11.3 that Python pickled members of enumerations as getattr(class, name)."""
    weight = torch.randn(3)
    folder = _save(tmp_path / "state", weight=weight)
    with monkeypatch.context() as patched:
        patched.setattr(Enum, "__reduce_ex__", lambda member, protocol: (getattr, (type(member), member.name)))
        _edit_metadata(folder, lambda metadata: None)
    assert b"getattr" in (folder / ".metadata").read_bytes()
    assert torch.equal(DistributedCheckpoint(folder, ignore=_ignore_nothing)["weight"], weight)


class _Hostile:
    """Touches a file when unpickled the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_metadata_cannot_run_code(tmp_path: Path) -> None:
    weight = torch.randn(3)
    folder, trace = _save(tmp_path / "state", weight=weight), tmp_path / "trace"

    def add_hostile_record(metadata: Metadata) -> None:
        metadata.planner_data = _Hostile(trace)

    _edit_metadata(folder, add_hostile_record)
    assert torch.equal(DistributedCheckpoint(folder, ignore=_ignore_nothing)["weight"], weight)
    assert not trace.exists()


class _Foreign:
    """A record of a class that the reader does not know, with a state of its own."""

    def __init__(self) -> None:
        self.content = [1, 2]

    def __setstate__(self, state: object) -> None:
        raise AssertionError("foreign code ran")


def test_records_of_unknown_classes_are_passed_over(tmp_path: Path) -> None:
    folder = _save(tmp_path / "state", weight=torch.ones(2))
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = _Foreign()
    path.write_bytes(pickle.dumps(metadata))
    assert list(DistributedCheckpoint(folder, ignore=_ignore_nothing)) == ["weight"]


def test_a_folder_without_metadata(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no \.metadata file"):
        DistributedCheckpoint(tmp_path, ignore=_ignore_nothing)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2])])
def test_unreadable_metadata(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
        DistributedCheckpoint(tmp_path, ignore=_ignore_nothing)


def test_a_missing_block_is_noticed(tmp_path: Path) -> None:
    folder = _save(tmp_path / "state", weight=Blocks.of(torch.zeros(8, 3), 4))
    _edit_metadata(folder, lambda metadata: metadata.state_dict_metadata["weight"].chunks.pop() and None)
    with pytest.raises(ValueError, match="holds 18 of the 24 elements of weight; the checkpoint is incomplete"):
        DistributedCheckpoint(folder, ignore=_ignore_nothing)


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_damaged_data_files(tmp_path: Path, damage: str) -> None:
    folder = _save(tmp_path / "state", weight=torch.zeros(1000))
    checkpoint = DistributedCheckpoint(folder, ignore=_ignore_nothing)
    (data,) = folder.glob("*.distcp")
    if damage == "delete":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"weight cannot be read from .*; the checkpoint is damaged"):
        checkpoint["weight"]
