"""The images themselves: built by buildah on stand-ins for their bases, and run. See images.py for what is real."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from images import DEBIAN, NVIDIA, RELABEL, ROOT, SLIM_PYTHON, Builder, builder, cuda_toolkit, find_torch, why_not
from test_container import stages

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

THEIR_TORCH = "2.10.0a0+b4e4ee81d3.nv25.12"
THEIR_NUMPY = "2.3.5"
"""Another than tools/constraints.txt has."""


def defaults() -> dict[str, str]:
    """Build arguments and what they are unless given."""
    return dict(re.findall(r"^ARG (\w+)=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))


def base(stage: str, **arguments: str) -> str:
    """The full name of the base of a stage."""
    name = re.sub(r"\$\{(\w+)\}", lambda found: {**defaults(), **arguments}[found[1]], stages()[stage].base)
    return name if "/" in name else f"docker.io/library/{name}"


@dataclass(frozen=True)
class Workshop:
    """A builder, a bare Debian in it, and where torch comes from."""

    build: Builder
    system: str
    python: str
    index: str


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    if reason := why_not():
        pytest.skip(reason)
    torch = find_torch(defaults()["TORCH"], defaults()["TORCH_INDEX"])
    if torch is None:
        pytest.skip("pip reaches no CPU build of torch for the Python of a Debian")
    with builder(tmp_path_factory.mktemp("images")) as build:
        try:
            system = build.add_debian(torch.release)
        except ConnectionError as error:
            pytest.skip(str(error))
        yield Workshop(build, system, DEBIAN[torch.release], torch.index)


def build_cpu(workshop: Workshop, fmt: str) -> str:
    """The CPU image in a format, by its name."""
    tag = f"localhost/megadiff-{fmt}:cpu"
    name = base("cpu", PYTHON=workshop.python)
    workshop.build.add_base(name, SLIM_PYTHON.format(system=workshop.system))
    arguments = (f"PYTHON={workshop.python}", f"TORCH_INDEX={workshop.index}")
    options = [f"--build-arg={argument}" for argument in arguments]
    workshop.build.build(tag, ROOT, "--format", fmt, "--target", "cpu", *options)
    return tag


def test_the_cpu_image_trains_in_the_format_of_oci(workshop: Workshop) -> None:
    with workshop.build.container(build_cpu(workshop, "oci")) as run:
        assert "native" in run("megadiff", "doctor", "--require", "cpu")
        assert run("id", "-u").strip() == "1000" and run("pwd").strip() == "/workspace"
        library = f"/usr/lib/python{workshop.python}"
        corpus = ("--output-dir", "data/quickstart", "--vocab-size", "2048", "--validation-fraction", "0.2")
        run("megadiff", "prepare", *corpus, "--input", f"{library}/json", f"{library}/logging")
        recipe = ("/opt/megadiff/examples/recipes/quickstart.py", "--run-dir", "runs/quickstart")
        settings = ("--training.train-steps", "4", "--validation.num-sequences", "32")
        run("env", "OMP_NUM_THREADS=1", "megadiff", "train", *recipe, *settings)
        lines = [json.loads(line) for line in run("cat", "runs/quickstart/metrics.jsonl").splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
        assert lines[-1]["split"] == "validation" and lines[-1]["nelbo"] < lines[0]["nelbo"]
        run("test", "-s", "runs/quickstart/checkpoints/step_00000004/manifest.json")


def test_the_cpu_image_tells_its_health_in_the_format_of_docker(workshop: Workshop) -> None:
    image = build_cpu(workshop, "docker")
    config = json.loads(workshop.build("inspect", "--type", "image", image))["Docker"]["config"]
    kind, *health = config["Healthcheck"]["Test"]
    assert kind == "CMD" and config["User"] == "1000"
    with workshop.build.container(image) as run:
        run(*health)


def test_the_gpu_image_is_built_up_to_the_check_that_its_kernels_load(workshop: Workshop) -> None:
    """The base's torch is a CPU build under the version of NVIDIA's, so all works but the kernels for GPUs."""
    toolkit = cuda_toolkit()
    if toolkit is None:
        pytest.skip("no nvcc with its headers beside it: install CUDA's compiler")
    check = next(
        rest for instruction, rest in stages()["gpu"].steps if instruction == "RUN" and "--require-library" in rest
    )
    containerfile = NVIDIA.format(
        system=workshop.system,
        index=workshop.index,
        torch=defaults()["TORCH"],
        numpy=THEIR_NUMPY,
        version=THEIR_TORCH,
    )
    constraint = f"torch=={THEIR_TORCH}\nnumpy=={THEIR_NUMPY}\n"
    workshop.build.add_base(base("gpu"), containerfile, **{"relabel.py": RELABEL, "constraint.txt": constraint})
    cuda = f"--volume={toolkit}:/usr/local/cuda:ro"
    said = workshop.build.build("localhost/megadiff:gpu", ROOT, cuda, "--format", "oci", "--target", "gpu", fails=True)

    steps = re.findall(r"STEP \d+/\d+: (.*)$", said, re.MULTILINE)
    assert steps and steps[-1] == f"RUN {check}", said[-6000:]
    sentence = f"the native kernels for cuda cannot be used by torch {THEIR_TORCH}: libmegadiff_cuda.so does not load"
    assert sentence in said and "libtorch_cuda.so" in said.partition(sentence)[2]
    assert f"keeping torch {THEIR_TORCH}" in said

    *_, layer = re.findall(r"^--> (?:Using cache )?([0-9a-f]+)$", said, re.MULTILINE)
    with workshop.build.container(layer) as run:
        found = dict(line.split(maxsplit=1) for line in run("python", "-m", "pip", "list").splitlines())
        ours = re.findall(r"^(.+)==(.+)$", (ROOT / "tools" / "constraints.txt").read_text(), re.MULTILINE)
        assert (found["torch"], found["numpy"]) == (THEIR_TORCH, THEIR_NUMPY)
        assert found["tensorboard"] == dict(ours)["tensorboard"], "ours hold for what theirs leave open"
        where = run("python", "-c", "import torch; print(torch.__file__)")
        assert where.startswith("/usr/local/lib/python"), "the base's own"
        assert run("megadiff", "doctor", "--require", "cpu")
