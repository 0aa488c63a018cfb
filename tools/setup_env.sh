# Sourced by examples/quickstart.sh and tests/run.sh: a Python environment with megadiff in it.
#
#     source tools/setup_env.sh; setup_env EXTRAS        # EXTRAS as in pip: hf, dev
#
# An active environment is used as it is; else .venv is made. torch is installed first, exactly pinned, and only where
# none is present: a container's own torch stays. Nothing is built in isolation, so no second torch is ever fetched.
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf …) decide where packages come from.

say() { printf '\n==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.10 to 3.13 found: install one, or name it with PYTHON=/path/to/python"
}

make_venv() {
    local python options=()
    python=$(find_python) || exit 2
    # A torch of the system (a container's) stays visible and is used.
    if "$python" -c 'import torch' 2>/dev/null; then options+=(--system-site-packages); fi
    say "making .venv with $("$python" --version)"
    if ! "$python" -m venv "${options[@]}" .venv >/dev/null 2>&1; then
        # Debian splits ensurepip off into python3-venv; pip of the system can stand in.
        rm -rf .venv
        { "$python" -m venv "${options[@]}" --without-pip .venv &&
            "$python" -m pip --python .venv/bin/python install -q pip; } ||
            { rm -rf .venv; die "cannot make a virtual environment: apt-get install python3-venv, then start again"; }
    fi
}

setup_env() {
    local extras=$1 torch stamp wanted
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        [ -x .venv/bin/python ] || make_venv
        # shellcheck disable=SC1091
        source .venv/bin/activate
    fi

    wanted=$({ cat pyproject.toml setup.py; echo "$extras $PWD ${MEGADIFF_TORCH:-}"; } | sha256sum | cut -d' ' -f1)
    stamp=$(python -c 'import sys; print(sys.prefix)')/.megadiff-$extras
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi

    command -v c++ >/dev/null || command -v g++ >/dev/null ||
        say "no C++ compiler found: megadiff installs, but native kernels cannot be built (apt-get install g++)"
    if ! python -c 'import torch' 2>/dev/null; then
        torch=${MEGADIFF_TORCH:-2.13.0}
        case $torch in torch*) ;; *) torch="torch==$torch" ;; esac
        say "installing $torch (where pip's index has no CPU build this is the CUDA build: a download of gigabytes; README.md names a CPU index)"
        python -m pip install -q "$torch" || die "pip could not install $torch: check the index settings, or set MEGADIFF_TORCH"
    fi
    say "installing megadiff and what it needs"
    python -m pip install -q "setuptools>=68" wheel
    python -m pip install -q --no-build-isolation -e ".[$extras]" || die "pip could not install megadiff: see its message above"
    echo "$wanted" >"$stamp"
}
