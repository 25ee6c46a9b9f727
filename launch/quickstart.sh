#!/usr/bin/env bash
# Train a small mixture of experts three times on the same text, under the symmetry stack, under Muon with AdamW, and
# under AdamW, and set them side by side.
#   bash launch/quickstart.sh [--newest] [--nproc 2] [--recipe small-moe] [--steps 300] [--model olmoe-tiny] [any option of launch.pretrain]
set -euo pipefail

cd "$(dirname "$0")/.."
nproc=2
recipe=small-moe
options=()
settings=()
while [ $# -gt 0 ]; do
    case $1 in
        --nproc | --recipe)
            [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            if [ "$1" = --nproc ]; then nproc=$2; else recipe=$2; fi
            shift 2
            ;;
        --newest) export SYMDIST_NEWEST=1; shift ;;
        --nproc=*) nproc=${1#*=}; shift ;;
        --recipe=*) recipe=${1#*=}; shift ;;
        --override | --lr)
            # Meant for the first stack: the baselines stay what they are called.
            [ $# -gt 1 ] || { echo "error: $1 needs a value, as in --override router.lr=0.02 or --lr 0.01" >&2; exit 2; }
            settings+=("$1" "$2")
            shift 2
            ;;
        --override=* | --lr=*) settings+=("$1"); shift ;;
        --output | --output=*)
            echo "error: quickstart chooses the output folders; use launch.pretrain to choose your own" >&2
            exit 2
            ;;
        -h | --help)
            sed -n '2,4s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        *) options+=("$1"); shift ;;
    esac
done

. launch/environment.sh launch
# Models come from their configurations, so nothing is to be looked up but a dataset that is asked for by name.
case " ${options[*]:-} " in *datasets:*) ;; *) export HF_HUB_OFFLINE=1 ;; esac
# One core a rank: more threads than cores make each other wait.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c "import os, sys; print(max(1, len(os.sched_getaffinity(0)) // int(sys.argv[1])))" "$nproc")}

folder=runs/quickstart/$(date +%Y%m%d-%H%M%S)
finished=()
for stack in "$recipe" muon adamw; do
    run=$folder/$(basename "$stack" .toml)
    [ -d "$run" ] && continue
    echo "== $stack" >&2
    torchrun --standalone --nproc_per_node="$nproc" -m launch.pretrain --recipe "$stack" --output "$run" \
        "${options[@]}" "${settings[@]}"
    settings=()
    finished+=("$run")
done
symdist report "${finished[@]}" --output "$folder/report.html" --picture "$folder/curves.png"
