# Sourced: make .venv beside this repository with symdist and the named extras, once, and put it on the PATH.
#   . launch/environment.sh launch        or        . launch/environment.sh launch,dev
# The versions are those of launch/constraints.txt, on which the tests passed. SYMDIST_NEWEST=1 takes the newest of
# everything instead, in .venv-newest, and prints what it installed.
# PYTHON names the interpreter to make it with (3.11 or newer); TORCH another requirement to install PyTorch by.

symdist_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
symdist_newest=${SYMDIST_NEWEST:+-newest}
symdist_venv=${SYMDIST_VENV:-$symdist_root/.venv$symdist_newest}

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

# torchtitan, for tests of its models alone. What these import is in dev; some of the rest that torchtitan requires would
# put older releases of other packages in the place of ours.
symdist_install_models() {
    case ",$1," in
        *,dev,*) "$symdist_venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps torchtitan==0.3.0 ;;
    esac
}

symdist_install() {
    local extras=$1 python mark torch pins
    pins=$symdist_root/launch/constraints.txt
    mark=$symdist_venv/.installed-$(cat "$symdist_root/pyproject.toml" "$symdist_root/setup.cfg" "$pins" | cksum | cut -d' ' -f1)-$extras
    [ -f "$mark" ] && [ -z "$symdist_newest" ] && return
    python=$(symdist_python) || return 1
    echo "installing into $symdist_venv" >&2
    [ -x "$symdist_venv/bin/python" ] || "$python" -m venv "$symdist_venv" || return 1
    if [ -n "$symdist_newest" ]; then
        "$symdist_venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
            "${TORCH:-torch}" --editable "$symdist_root[$extras]" || return 1
        symdist_install_models "$extras" || return 1
        "$symdist_venv/bin/python" -m pip freeze --disable-pip-version-check --exclude-editable
    else
        torch=$(grep '^torch==' "$pins")
        # Another PyTorch than the one pinned is its own business.
        "$symdist_venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint <(grep -v "^torch==" "$pins") "${TORCH:-$torch}" --editable "$symdist_root[$extras]" || return 1
        symdist_install_models "$extras" || return 1
    fi
    touch "$mark"
}

symdist_install "$1" || exit 1
export PATH=$symdist_venv/bin:$PATH
