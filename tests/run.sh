#!/usr/bin/env bash
# Everything a change must pass, from a fresh clone: makes the environment, then lint, types, layers, security, documents and tests.
#   bash tests/run.sh [--newest] [--all] [pytest arguments]
# Of the largest tests the cases of tests/gate.py run; with --all every case, as a release needs.
# With --newest the environment is another, of the newest release of everything, and what it has is printed.
set -euo pipefail

cd "$(dirname "$0")/.."
if [ "${1:-}" = --newest ]; then
    export SYMDIST_NEWEST=1
    shift
fi
. launch/environment.sh launch,deepspeed,megatron,dev
ruff check .
ruff format --check .
mypy
lint-imports
bandit --quiet --configfile pyproject.toml --recursive symdist integrations launch
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet --site-dir build/site
# One thread, for several ranks share the cores; and no test looks anything up.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# Two workers: much of the time one core would wait, for ranks to start or a test of one process.
python -m pytest --numprocesses 2 --no-loadscope-reorder "$@"
