#!/usr/bin/env bash
# Pretrain on several nodes: run this on each of them, with the same CONFIG.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash launch/multinode.sh launch/configs/olmoe-1b-7b.toml \
#       [any option of pretrain.py]
# --help says what else can be set, and what happens when a node is lost.
set -euo pipefail

# shellcheck source=launch/node.sh
. "$(dirname "${BASH_SOURCE[0]}")/node.sh"
run_node pretrain.py "$@"
