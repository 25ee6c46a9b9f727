#!/usr/bin/env bash
# Write launch/constraints.txt anew: the newest of everything that the two commands of the README install, but for PyTorch,
# which TORCH names.
#   TORCH=torch==2.13.0 bash launch/pin.sh
set -euo pipefail

cd "$(dirname "$0")/.."
export TORCH=${TORCH:-$(grep '^torch==' launch/constraints.txt)}
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
pins=$(SYMDIST_NEWEST=1 SYMDIST_VENV=$venv bash -c '. launch/environment.sh launch,deepspeed,megatron,dev')
# Versions alone: which build of a version a machine takes is its own business.
printf '# Made by launch/pin.sh: the versions on which the tests passed.\n%s\n' "$(sed -E 's/\+[a-z0-9.]+$//' <<<"$pins")" >launch/constraints.txt
