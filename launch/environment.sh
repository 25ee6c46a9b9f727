# Sourced: make .venv beside this repository with symdist and the named extras, once, and put it on the PATH.
#   . launch/environment.sh launch        or        . launch/environment.sh launch,dev
# PYTHON names the interpreter to make it with (3.11 or newer); TORCH the requirement to install PyTorch by.

symdist_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
symdist_venv=${SYMDIST_VENV:-$symdist_root/.venv}

symdist_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python" >&2
    return 1
}

symdist_install() {
    local extras=$1 python mark
    mark=$symdist_venv/.installed-$(cat "$symdist_root/pyproject.toml" "$symdist_root/setup.cfg" | cksum | cut -d' ' -f1)-$extras
    [ -f "$mark" ] && return
    python=$(symdist_python) || return 1
    echo "installing into $symdist_venv" >&2
    [ -x "$symdist_venv/bin/python" ] || "$python" -m venv "$symdist_venv" || return 1
    "$symdist_venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "${TORCH:-torch==2.13.0}" --editable "$symdist_root[$extras]" || return 1
    touch "$mark"
}

symdist_install "$1" || exit 1
export PATH=$symdist_venv/bin:$PATH
