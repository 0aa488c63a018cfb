#!/usr/bin/env bash
# Everything that must hold. Installs what is missing.
#
#     bash tests/run.sh                 the quick tests
#     bash tests/run.sh --all           style and types (tools/style.sh), and the slow tests, too; this is what CI runs
#     bash tests/run.sh --exhaustive    and every layout of four processes, not a third of them; more kinds of kills;
#                                       the container images, built and run
#     bash tests/run.sh --gpu           on a machine with a GPU, what needs one; nothing else
#     bash tests/run.sh -k layouts      further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

# The cluster of tests/slurm is a real one, of this machine alone.
install_slurm() {
    if command -v slurmctld >/dev/null; then return; fi
    say "installing Slurm by apt-get"
    apt_get slurm-wlm munge || say "Slurm cannot be installed here, so its tests are skipped: it takes root and apt-get"
}

# Container images are built without a daemon, on Debian's packages.
install_builders() {
    if command -v buildah >/dev/null && command -v debootstrap >/dev/null; then return; fi
    say "installing buildah and debootstrap by apt-get"
    apt_get buildah debootstrap ||
        say "buildah cannot be installed here, so no images are built: it takes root and apt-get"
}

setup_env test
export OMP_NUM_THREADS=1

selected="not slow and not gpu"
case "${1:-}" in
    --all | --exhaustive)
        selected="not gpu"
        bash tools/style.sh
        install_slurm
        if [ "$1" = --all ]; then selected+=" and not exhaustive"; else install_builders; fi
        shift
        ;;
    --gpu)
        selected="gpu"
        shift
        ;;
esac

say "pytest -m '$selected'"
python -m pytest -m "$selected" --durations 10 "$@"
