# Sourced by examples/quickstart.sh and tests/run.sh: a Python environment with megadiff in it.
#
#     source tools/setup_env.sh; setup_env EXTRAS        # EXTRAS as in pip: hf, test
#
# An active environment is used as it is; else .venv is made. torch is installed first, exactly pinned, and only where
# none is present: a container's own torch stays. megadiff is built without isolation, so no second torch is ever fetched.
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf …) decide where packages come from.

say() { printf '\n==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; }

# Present, whether or not it works: a broken torch is to be repaired by its owner, never to be replaced.
has_torch() {
    "$1" -c 'from importlib.util import find_spec as find; import sys; sys.exit(not getattr(find("torch"), "origin", 0))'
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.10 to 3.13: name another, or unset PYTHON"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.10 to 3.13 found: install one, or name it with PYTHON=/path/to/python"
}

make_venv() {
    local python options=(--without-pip)
    python=$(find_python) || exit 2
    # A torch of the system (a container's) stays visible and is used.
    if has_torch "$python"; then options+=(--system-site-packages); fi
    say "making .venv with $("$python" --version)"
    "$python" -m venv "${options[@]}" .venv ||
        { rm -rf .venv; die "cannot make a virtual environment: apt-get install python3-venv, then start again"; }
}

# Python's own copy of pip, or the system's: Debian and Ubuntu package both apart from Python, and a pip before 22.3
# cannot install into another environment. On a bare machine root may fetch what is missing.
ensure_pip() {
    if python -m pip --version >/dev/null 2>&1; then return; fi
    say "installing pip"
    python -m ensurepip >/dev/null 2>&1 ||
        "$(python -c 'import sys; print(sys._base_executable)')" -m pip --python "$(command -v python)" install -q pip \
            2>/dev/null ||
        { say "installing python3-venv by apt-get" && apt_get python3-venv && python -m ensurepip >/dev/null 2>&1; } ||
        die "cannot install pip: apt-get install python3-venv, then start again"
}

# Only as root, and quietly.
apt_get() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y "$@" >/dev/null
}

install_torch() {
    local torch=${MEGADIFF_TORCH:-2.13.0}
    case $torch in [0-9]*) torch="torch==$torch" ;; esac
    say "installing $torch: where pip's index has no CPU build this is the CUDA build, a download of gigabytes" \
        "(README.md names a CPU index)"
    # Not quiet: gigabytes must be seen to come.
    python -m pip install "$torch" ||
        die "pip could not install $torch: check the index settings, or set MEGADIFF_TORCH to a version it has"
}

# An environment that is active, or .venv.
activate_env() {
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        [ -x .venv/bin/python ] || make_venv
        # As its activate would, but a checkout may have moved since.
        export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
    fi
    supported python ||
        die "the environment ${VIRTUAL_ENV:-$CONDA_PREFIX} has no Python 3.10 to 3.13: deactivate or remove it"
}

setup_env() {
    local extras=$1 prefix stamp wanted version pin
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    activate_env
    prefix=$(python -c 'import sys; print(sys.prefix)')
    stamp=$prefix/.megadiff-$extras
    # What is built depends on the sources and on the compilers at hand.
    wanted=$({
        find csrc -type f -print0 | sort -z | xargs -0 cat pyproject.toml setup.py
        command -v c++ g++ nvcc || true
        echo "$extras $PWD ${MEGADIFF_TORCH:-} ${MEGADIFF_BUILD:-} ${MEGADIFF_CUDA_ARCHS:-} ${CXX:-} ${NVCC:-}"
    } | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi

    command -v c++ >/dev/null || command -v g++ >/dev/null ||
        say "no C++ compiler found: megadiff installs, but native kernels cannot be built (apt-get install g++)"
    ensure_pip
    has_torch python || install_torch
    version=$(python -W ignore -c 'import torch; print(torch.__version__)') ||
        die "the torch in $prefix cannot be imported, see above: repair it, or use another environment"
    python -c 'import re, sys; sys.exit(tuple(map(int, re.findall(r"\d+", sys.argv[1])[:2])) < (2, 10))' "$version" ||
        die "the torch in $prefix is $version, but megadiff needs 2.10 or newer: upgrade it, or use another environment"
    # pip compares the version in the metadata, which may lack the build: 2.13.0 where torch itself says 2.13.0+cu130.
    pin=$(python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null) ||
        die "the torch in $prefix is not known to pip, which would install another: install it by pip, or use another" \
            "environment"

    say "installing megadiff and what it needs, keeping torch $version"
    # The pin adds to constraints that are set already (PIP_CONSTRAINT in NVIDIA's containers). Built by itself, megadiff is
    # there when pip is asked for its needs, and nothing else is built without isolation.
    echo "torch==$pin" >"$prefix/.megadiff-torch"
    {
        python -m pip install -q "pip>=22.3" "setuptools>=70.1" wheel && # --python, in tools/style.sh, came with 22.3
            python -m pip install -q --no-build-isolation --no-deps -e . &&
            python -m pip install -q --constraint "$prefix/.megadiff-torch" "megadiff[$extras]"
    } || die "pip could not install megadiff: see its message above"
    echo "$wanted" >"$stamp"
}
