#!/usr/bin/env bash
# Style and types, by pinned tools on every supported Python.
#
#     bash tools/style.sh          check; `bash tests/run.sh --all` and pre-commit call it
#     bash tools/style.sh --fix    and mend what can be mended by itself
#
# The tools lie in .venv-style, made from tools/style_requirements.txt. Of megadiff's own environment mypy reads torch, so
# findings of types are those of its version; tools/setup_env.sh installs one that is pinned.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

# Behind its own packages an environment sees those of megadiff's: a .pth file adds their folder to the path.
make_style_env() {
    local wanted
    wanted=$({ cat tools/style_requirements.txt; python -c 'import sys; print(*sys.path[1:], sys.version)'; pwd; } | sha256sum)
    if [ "$(cat .venv-style/made-of 2>/dev/null)" = "$wanted" ]; then return; fi
    say "making .venv-style with the pinned tools"
    rm -rf .venv-style
    python -m venv --without-pip .venv-style
    python -m pip --python .venv-style/bin/python install -q --no-deps -r tools/style_requirements.txt ||
        die "pip could not install the tools of tools/style_requirements.txt: see its message above"
    python -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
        >"$(.venv-style/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/megadiff.pth"
    echo "$wanted" >.venv-style/made-of
}

check=() format=(--check)
case "${1:-}" in
    --fix) check=(--fix) format=() ;;
    "") ;;
    *) die "unknown argument $1: tools/style.sh takes --fix or nothing" ;;
esac
activate_env
has_torch python || setup_env test
make_style_env
say "ruff"
.venv-style/bin/ruff check ${check[@]+"${check[@]}"} .
.venv-style/bin/ruff format ${format[@]+"${format[@]}"} .
say "mypy"
.venv-style/bin/python -m mypy
