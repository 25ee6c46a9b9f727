#!/usr/bin/env bash
# Pretrain under Megatron on several nodes: run this on each of them, with the same CONFIG.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash launch/multinode_megatron.sh launch/configs/megatron/olmoe.toml \
#       [any option of pretrain_megatron.py]
# --help says what else can be set, and what happens when a node is lost.
set -euo pipefail

# shellcheck source=launch/node.sh
. "$(dirname "${BASH_SOURCE[0]}")/node.sh"
run_node pretrain_megatron.py "$@"
