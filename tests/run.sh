#!/usr/bin/env bash
# Everything that must hold: style, types, tests. Installs what is missing.
#
#     bash tests/run.sh                 the quick tests
#     bash tests/run.sh --all           the slow ones too, the quickstart among them; this is what CI runs
#     bash tests/run.sh -k layouts      further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

setup_env dev
export OMP_NUM_THREADS=1

selected="not slow and not gpu"
if [ "${1:-}" = "--all" ]; then
    selected="not gpu"
    shift
fi

say "ruff"
python -m ruff check .
python -m ruff format --check .
say "mypy"
python -m mypy
say "pytest -m '$selected'"
python -m pytest -m "$selected" --durations 10 "$@"
