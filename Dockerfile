# megadiff in a container, for nodes with GPUs and for machines without.
#
#     docker build -t megadiff .                    NVIDIA's PyTorch: Transformer Engine, Apex, NCCL, kernels for 80, 90, 100
#     docker build -t megadiff:cpu --target cpu .   a slim Python with a CPU build of torch
#     docker run --rm -it --gpus all --ipc host --ulimit memlock=-1 -v "$PWD/runs:/workspace/runs" megadiff
#
# Both install as examples/quickstart.sh does, by tools/setup_env.sh: an image is nothing else than a machine on which
# that has run. It is a bash script, and bash is called by name: an OCI image, podman's default, cannot name another SHELL
# than sh. Layers change as often as what is in them: system, torch, other packages and kernels, Python sources.
# Other versions: --build-arg NVIDIA_PYTORCH=... , TORCH=... ; docs/container.md has Slurm's and Apptainer's lines.

ARG NVIDIA_PYTORCH=25.12-py3
ARG PYTHON=3.12

# --- without a GPU ------------------------------------------------------------------------------------------------------

FROM python:${PYTHON}-slim AS cpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 megadiff && install -d -o 1000 /opt/megadiff /workspace
USER 1000
WORKDIR /opt/megadiff
ENV VIRTUAL_ENV=/opt/megadiff/.venv PATH=/opt/megadiff/.venv/bin:$PATH PIP_NO_CACHE_DIR=1 MEGADIFF_BUILD=cpu

ARG TORCH=2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv .venv && PIP_EXTRA_INDEX_URL=$TORCH_INDEX pip install "torch==$TORCH"

COPY --chown=1000 pyproject.toml setup.py README.md LICENSE ./
COPY --chown=1000 csrc csrc
COPY --chown=1000 megadiff/__init__.py megadiff/
COPY --chown=1000 megadiff/ops/_sources.py megadiff/ops/
COPY --chown=1000 tools/setup_env.sh tools/constraints.txt tools/
RUN bash -euo pipefail -c '. tools/setup_env.sh; PIP_CONSTRAINT=tools/constraints.txt setup_env all'

COPY --chown=1000 . .
WORKDIR /workspace
HEALTHCHECK --interval=5m --timeout=1m --start-period=1m CMD ["megadiff", "doctor", "--health", "cpu"]
CMD ["bash"]

# --- with GPUs, the default ---------------------------------------------------------------------------------------------

FROM nvcr.io/nvidia/pytorch:${NVIDIA_PYTORCH} AS gpu
# The base image has a user 1000 already.
RUN install -d -o 1000 /opt/megadiff /workspace
USER 1000
WORKDIR /opt/megadiff
ENV VIRTUAL_ENV=/opt/megadiff/.venv PATH=/opt/megadiff/.venv/bin:$PATH PIP_NO_CACHE_DIR=1
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt

# The container's torch, Transformer Engine and Apex stay visible, and its own constraints stay in force: ours hold
# only what it leaves open. Its Python has pip, but not the copy that a new environment would be given.
RUN python -m venv --without-pip --system-site-packages .venv

COPY --chown=1000 pyproject.toml setup.py README.md LICENSE ./
COPY --chown=1000 csrc csrc
COPY --chown=1000 megadiff/__init__.py megadiff/
COPY --chown=1000 megadiff/ops/_sources.py megadiff/ops/
COPY --chown=1000 tools/setup_env.sh tools/constraints.txt tools/open_constraints.py tools/
ENV MEGADIFF_CUDA_ARCHS=80;90a;100
RUN python tools/open_constraints.py "$PIP_CONSTRAINT" tools/constraints.txt > .venv/constraints.txt \
    && bash -euo pipefail -c '. tools/setup_env.sh; PIP_CONSTRAINT="$PIP_CONSTRAINT .venv/constraints.txt" setup_env all'

COPY --chown=1000 . .
# Kernels that do not load would be replaced by slow operators in every job.
RUN megadiff doctor --require-library cuda
WORKDIR /workspace
HEALTHCHECK --interval=5m --timeout=1m --start-period=1m CMD ["megadiff", "doctor", "--health", "cuda"]
CMD ["bash"]
