"""The arrows of the house: who may import whom, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megadiff"
LEAVES = {"philox", "fields"}
ALLOWED = {
    "philox": set(),
    "fields": set(),
    "exit_codes": set(),
    "console": set(),
    "devices": set(),
    "arguments": {"fields"},
    "machine": set(),
    "accelerations": {"machine"},
    "records": set(),
    "integrity": set(),
    "diffusion": {"philox"},
    "ops": set(),
    "parallel": {"fields", "ops"},
    "models": LEAVES | {"accelerations", "ops", "parallel"},
    "data": LEAVES,
    "hf": {"integrity", "models", "records"},
    "training": {
        "accelerations",
        "data",
        "devices",
        "diffusion",
        "evaluation",
        "exit_codes",
        "fields",
        "integrity",
        "machine",
        "models",
        "ops",
        "parallel",
        "records",
    },
    "evaluation": {"data", "diffusion", "fields", "models", "objectives", "parallel", "training"},
    "objectives": {"diffusion", "fields", "ops"},
    "config": {"data", "evaluation", "fields", "models", "objectives", "parallel", "training"},
    "planning": {"config", "models", "parallel"},
    "plan_report": {"config", "planning"},
    "pace": {"config", "devices", "fields", "planning"},
    "dry_run": {"accelerations", "config", "models", "parallel", "planning", "training"},
    "importing": {"config", "data", "hf", "machine", "models", "objectives", "parallel", "training"},
    "doctor": {"accelerations", "machine", "ops"},
    "preflight": {"devices", "exit_codes", "fields", "integrity", "machine"},
}
TORCH_ONLY = ("philox", "accelerations", "diffusion", "integrity", "ops", "records")
FORBIDDEN = {
    "hf": {"megatron"},
    "data": {"torch.distributed"},
    "models": {"sentencepiece"},
}
# Of training, evaluation knows the step that both share, never optimizer or trainer; of models, exports know factors.
EVALUATION_MAY_USE = {"megadiff.training.step"}
HF_MAY_USE = {"megadiff.models.parametrization"}


def imports(path: Path) -> set[str]:
    """Modules a file imports at run time; imports for type checkers only do not count."""
    tree = ast.parse(path.read_text())
    type_checking = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in type_checking:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            found.add(node.module or "")
            if node.module == "megadiff":
                found |= {f"megadiff.{alias.name}" for alias in node.names}
    return found


def files_of(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.exists() else sorted((PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room: str) -> None:
    for path in files_of(room):
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("megadiff.")} - {room}
        assert rooms <= ALLOWED[room], f"{path.name} imports {sorted(rooms - ALLOWED[room])}"


@pytest.mark.parametrize("room", TORCH_ONLY)
def test_mathematics_imports_only_torch(room: str) -> None:
    import sys

    for path in files_of(room):
        others = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"torch", "megadiff"}
        assert not others, f"{path} imports {others}"


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_do_not_know_what_they_must_not(room: str) -> None:
    for path in files_of(room):
        for name in imports(path):
            assert not any(name == f or name.startswith(f + ".") for f in FORBIDDEN[room]), f"{path} imports {name}"


def test_evaluation_knows_no_trainer() -> None:
    for path in files_of("evaluation"):
        used = {name for name in imports(path) if name.startswith("megadiff.training")}
        assert used <= EVALUATION_MAY_USE, f"{path.name} imports {used}"


def test_hf_knows_no_megatron_through_models() -> None:
    for path in files_of("hf"):
        used = {name for name in imports(path) if name.startswith("megadiff.models")}
        assert used <= HF_MAY_USE, f"{path.name} imports {used}"
    for module in HF_MAY_USE:
        (path,) = PACKAGE.parent.glob(f"{module.replace('.', '/')}.py")
        assert not {"megadiff", "megatron", "torch"} & {name.split(".")[0] for name in imports(path)}


def test_only_groups_touches_parallel_state() -> None:
    users = {path.name for path in PACKAGE.rglob("*.py") if "parallel_state" in path.read_text()}
    assert users == {"groups.py"}
