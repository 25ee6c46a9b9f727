#!/usr/bin/env bash
# Everything a change must pass, from a fresh clone: makes the environment, then lint, types and tests.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail

cd "$(dirname "$0")/.."
. launch/environment.sh launch,dev
ruff check .
ruff format --check .
mypy
# One thread: several ranks share the cores. Compiling would take longer than what it speeds up.
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1
python -m pytest "$@"
