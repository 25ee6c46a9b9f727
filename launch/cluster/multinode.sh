#!/usr/bin/env bash
# Pretrain on several nodes: run this on each of them, with the same CONFIG.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash launch/cluster/multinode.sh ENTRY CONFIG [any option of ENTRY]
# ENTRY is pretrain, pretrain_deepspeed or pretrain_megatron; CONFIG a file like launch/configs/olmoe-1b-7b.toml.
# --help says what else can be set, and what happens when a node is lost.
set -euo pipefail

# shellcheck source=launch/cluster/node.sh
. "$(dirname "${BASH_SOURCE[0]}")/node.sh"
run_node "$@"
