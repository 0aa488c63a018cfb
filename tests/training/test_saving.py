"""Saving goes wrong in every way and hurts nothing: held back, out of space, damaged, hostile, cut off at any point."""

from __future__ import annotations

import logging
import os
import pickle
import random
import resource
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from distributed import run_ranks
from tiny import tiny_config
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megadiff.integrity import damage, digest_of, read_manifest, write_manifest
from megadiff.training.checkpoint import list_checkpoints


def build(corpus: Path, run_dir: Path, **checkpoint: Any) -> Any:
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    config = tiny_config(
        corpus, parallel={"use_distributed_optimizer": True}, checkpoint=checkpoint, training={"train_steps": 100}
    )
    return Trainer(config, run_dir, parallel_groups.initialize(config.parallel))


def train(trainer: Any, num_steps: int) -> list[float]:
    batches = trainer.training_batches()
    return [trainer.train_step(batches)["loss"] for _ in range(num_steps)]


def hashes_of_state(checkpoint: Path) -> dict[str, str]:
    files = read_manifest(checkpoint)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")}


@contextmanager
def captured_log() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megadiff").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("megadiff").removeHandler(handler)


# In the background, on two ranks that share the state


def save_while_training(corpus: Path, directory: Path) -> dict[str, Any]:
    from megadiff.training import writer as writing
    from megadiff.training.resilience import Decisions, StepBoundary

    found: dict[str, Any] = {}
    at_once = build(corpus, directory / "at_once")
    losses = train(at_once, 2)
    at_once.save()
    train(at_once, 2)
    at_once.save()

    release, real_write = threading.Event(), writing._write

    def write_when_released(*arguments: Any) -> None:
        release.wait()
        real_write(*arguments)

    trainer = build(corpus, directory / "behind", async_save=True, interval_minutes=1e-6)
    rank = trainer.groups.rank
    assert train(trainer, 2) == losses
    boundary = StepBoundary(trainer.groups.control)

    def decide() -> Decisions:
        writer = trainer.writer
        return boundary.agree(save_is_due=rank == 0 and writer.is_due_by_clock, is_writing=writer.is_writing)

    found["due by the clock, all written"] = decide().save, decide().is_writing
    writing._write = write_when_released
    trainer.save()
    train(trainer, 2)
    found["held back"] = not decide().is_writing, trainer.last_checkpoint
    if rank == 0:
        release.set()
    trainer.groups.control.barrier().wait()
    found["held back on one rank"] = not decide().is_writing
    release.set()
    trainer.save(is_final=True)
    writing._write = real_write
    found["thread left"] = trainer.writer.is_writing or trainer.writer.in_flight
    trainer.groups.control.barrier().wait()
    for run in ("at_once", "behind"):
        found[run] = [hashes_of_state(checkpoint) for checkpoint in list_checkpoints(directory / run)]
    found["the newest again"] = damage_each_file(trainer)
    found["full"] = fill_the_disk(trainer)
    return found


def damage_each_file(trainer: Any) -> list[str]:
    """Flip bytes of every file of the newest checkpoint; what goes wrong, which should be nothing."""
    from megadiff.training.checkpoint import choose_checkpoint

    checkpoints = list_checkpoints(trainer.run_dir)
    older, newest = checkpoints
    failures = []
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    for path in files:
        content = path.read_bytes()
        positions = (0, random.Random(path.name).randrange(len(content)), len(content) - 1)
        for position in positions:
            trainer.groups.control.barrier().wait()
            if trainer.groups.rank == 0:
                flipped = bytearray(content)
                flipped[position] ^= 1
                path.write_bytes(flipped)
            trainer.groups.control.barrier().wait()
            with captured_log() as lines:
                chosen = choose_checkpoint(trainer.run_dir, trainer.config.checkpoint, trainer.groups.control)
            if chosen is None or chosen[0] != older:
                failures.append(f"{path} byte {position}: {chosen}")
            if trainer.groups.rank == 0 and not (len(lines) == 1 and path.name in lines[0]):
                failures.append(f"{path} byte {position} is not named: {lines}")
            trainer.groups.control.barrier().wait()
            if trainer.groups.rank == 0:
                newest.with_name(newest.name + ".damaged").replace(newest)
                path.write_bytes(content)
            trainer.groups.control.barrier().wait()
    assert {path.name for path in files} >= {"manifest.json", "config.yaml", "tokenizer.model", ".metadata"}
    assert {path.name for path in files} >= {"metadata.json", "common.pt", "__0_0.distcp", "__1_0.distcp"}
    trainer.groups.control.barrier().wait()
    chosen = choose_checkpoint(trainer.run_dir, trainer.config.checkpoint, trainer.groups.control)
    if chosen is None or chosen[0] != newest:
        failures.append(f"the restored checkpoint is not taken: {chosen}")
    return failures


def fill_the_disk(trainer: Any) -> dict[str, Any]:
    """Rank 1 may write no large file: for a save in the background, a waiting one, and the last one."""
    from megadiff.training.writer import SaveError

    before = [path.name for path in list_checkpoints(trainer.run_dir)]
    found: dict[str, Any] = {}
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trainer.groups.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    with captured_log() as lines:
        train(trainer, 1)
        trainer.save()
        train(trainer, 1)
        trainer.collect_save()
        found["log"] = list(lines)
        found["loss after"] = train(trainer, 1)[0]
        try:
            trainer.save(is_final=True)
        except SaveError as error:
            found["final"] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    found["kept"] = [path.name for path in list_checkpoints(trainer.run_dir)] == before
    found["left over"] = sorted(path.name for path in (trainer.run_dir / "checkpoints").iterdir()) != before
    trainer.groups.control.barrier().wait()
    trainer.save(is_final=True)
    found["saved again"] = trainer.last_checkpoint.name
    return found


def test_saves_in_the_background_and_survives_what_goes_wrong(corpus_dir: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, save_while_training, corpus_dir, tmp_path)
    assert first["due by the clock, all written"] == second["due by the clock, all written"] == (True, False)
    for found in (first, second):
        assert found["held back"] == (False, None)
        assert found["held back on one rank"] is False
        assert found["thread left"] is False
        # The state of step 2, though it was written after step 4; and both ranks wrote a share of it.
        assert found["behind"] == found["at_once"]
        assert [set(hashes) for hashes in found["behind"]] == [{"state/__0_0.distcp", "state/__1_0.distcp"}] * 2
        assert found["behind"][0] != found["behind"][1]
        assert found["the newest again"] == []
        full = found["full"]
        assert full["kept"] and not full["left over"]
        for message in (full["final"], *first["full"]["log"]):
            assert "could not be saved (rank 1: " in message and "File too large" in message
            assert "the last one is" in message and "step_00000004" in message
        assert full["saved again"] == "step_00000007"
    assert len(first["full"]["log"]) == 1 and first["full"]["log"][0].endswith("training goes on")
    assert second["full"]["log"] == []


# What a checkpoint could make a reader execute


class Hostile:
    """Makes a directory when unpickled the ordinary way."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def reseal(checkpoint: Path) -> None:
    """Give a changed checkpoint the right checksums."""
    manifest = read_manifest(checkpoint, verify=False)
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    del files["manifest.json"], manifest["files"]
    write_manifest(checkpoint, manifest, {name: digest_of(path) for name, path in files.items()})
    assert damage(checkpoint, read_manifest(checkpoint)) == []


def plant(state: Path, place: str, trace: Path) -> None:
    """Put a pickle that makes `trace` where Megatron or torch will unpickle."""
    metadata = pickle.loads((state / ".metadata").read_bytes())
    if place == "table of contents":
        metadata.planner_data = Hostile(trace)
    elif place == "common state":
        torch.save({"optimizer": Hostile(trace)}, state / "common.pt")
    else:
        torch.save(Hostile(trace), state / "hostile.distcp")
        wanted = "mlp.linear_fc1._extra_state" if place == "object" else "mlp.linear_fc1.weight"
        for index, storage in metadata.storage_data.items():
            if wanted in index.fqn:
                storage.relative_path, storage.offset = "hostile.distcp", 0
                storage.length = (state / "hostile.distcp").stat().st_size
                if place == "tensor declared an object":
                    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    (state / ".metadata").write_bytes(pickle.dumps(metadata))


PLACES = ("table of contents", "common state", "object", "tensor", "tensor declared an object")


def resume_from_hostile_and_cut_off(corpus: Path, directory: Path) -> dict[str, Any]:
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # as some do to be rid of an error
    found: dict[str, Any] = {}
    trainer = build(corpus, directory / "run")
    train(trainer, 1)
    trainer.save()
    for place in PLACES:
        run, trace = directory / place, directory / f"{place}.trace"
        shutil.copytree(directory / "run", run)
        state = run / "checkpoints" / "step_00000001" / "state"
        plant(state, place, trace)
        reseal(state.parent)
        trainer.run_dir = run
        try:
            trainer.resume()
            found[place] = "loaded", trace.exists()
        except ValueError as error:
            found[place] = str(error), trace.exists()
        # Not a dud: opened the ordinary way, it goes off.
        if place == "table of contents":
            pickle.loads((state / ".metadata").read_bytes())
        else:
            torch.load(state / ("common.pt" if place == "common state" else "hostile.distcp"), weights_only=False)
        assert trace.is_dir()
    found["environment"] = {name: value for name, value in os.environ.items() if name.startswith("TORCH_FORCE")}
    found["moments"] = save_and_look_at_every_moment(corpus, directory)
    return found


def save_and_look_at_every_moment(corpus: Path, directory: Path) -> list[tuple[str, list[str]]]:
    """Save twice, keeping one, and copy the run directory before every operation on its files.

    What a killed process leaves behind is what the directory holds at that moment.

    Returns:
        Each operation, with the undamaged checkpoints that were found just before it, "!" after a damaged one.
    """
    trainer = build(corpus, directory / "cut off", keep_last=1)
    checkpoints = trainer.run_dir / "checkpoints"
    moments: list[tuple[str, list[str]]] = []
    watching = threading.Lock()

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        operations = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if event not in operations or not str(arguments[0]).startswith(str(checkpoints)):
            return
        if not watching.acquire(blocking=False):
            return  # the look itself opens files
        try:
            seen = directory / "seen"
            shutil.rmtree(seen, ignore_errors=True)
            shutil.copytree(trainer.run_dir, seen)
            names = [path.name + "!" * bool(damage(path, read_manifest(path))) for path in list_checkpoints(seen)]
            moments.append((f"{event} {Path(str(arguments[0])).name}", names))
        finally:
            watching.release()

    train(trainer, 1)
    trainer.save()
    sys.addaudithook(look)
    train(trainer, 1)
    trainer.save()
    watching.acquire()  # a hook stays for good
    return moments


def test_no_code_of_a_checkpoint_runs_and_no_moment_is_without_one(corpus_dir: Path, tmp_path: Path) -> None:
    [found] = run_ranks(1, resume_from_hostile_and_cut_off, corpus_dir, tmp_path)
    for place in PLACES:
        message, exploded = found[place]
        assert not exploded, place
        assert "use another" in message, (place, message)
    assert "asks for posix.mkdir" in found["table of contents"][0]
    for place in PLACES[1:]:
        assert "an object that is no tensor" in found[place][0] or place.startswith("tensor declared"), found[place]
    assert found["environment"] == {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}

    moments = found["moments"]
    old, new = ["step_00000001"], ["step_00000002"]
    states = [names for _, names in moments]
    assert states.index(old) == 0 and states[-1] == new and all(names in (old, old + new, new) for names in states)
    operations = {operation for operation, _ in moments}
    assert operations >= {
        "os.mkdir step_00000002.partial",
        "open __0_0.distcp",
        "open common.pt",
        "open .metadata.tmp",
        "open manifest.json",
        "os.rename step_00000002.partial",
        "os.rename step_00000001",
        "os.rmdir step_00000001.deleting",
    }
