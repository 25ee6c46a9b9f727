#!/usr/bin/env bash
# Everything a change must pass, from a fresh clone: makes the environment, then lint, types and tests.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail

cd "$(dirname "$0")/.."
. launch/environment.sh launch,deepspeed,megatron,dev
ruff check .
ruff format --check .
mypy
# One thread, for several ranks share the cores; and no test looks anything up.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
python -m pytest "$@"
