#!/usr/bin/env bash
# Pretrain under Megatron on several nodes: run this on each of them, with the same CONFIG.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500 NPROC=8 \
#       bash launch/multinode_megatron.sh launch/configs/megatron/olmoe.toml [any option of pretrain_megatron.py]
# NNODES: how many nodes; NODE_RANK: which one this is, from 0; MASTER_ADDR and MASTER_PORT: where the first one listens;
# NPROC: processes a node, one a GPU. The config's folders for data, cache and output must be seen by all nodes.
set -euo pipefail

if [ $# -lt 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    [ $# -ge 1 ] && exit 0
    echo "error: give a CONFIG, as in launch/configs/megatron/olmoe.toml" >&2
    exit 2
fi
config=$1
shift
[ -f "$config" ] || { echo "error: there is no config $config" >&2; exit 2; }
for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC; do
    [ -n "${!name:-}" ] || { echo "error: set $name, as bash launch/multinode_megatron.sh --help says" >&2; exit 2; }
done

script=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/pretrain_megatron.py
# Kernels then start in the order in which Megatron issues them, which its overlap counts on.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="$NNODES" --node_rank="$NODE_RANK" \
    --nproc_per_node="$NPROC" --rdzv_backend=static --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" \
    "$script" --config "$config" "$@"
