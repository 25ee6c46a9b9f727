# Sourced by multinode.sh and job.sh: run_node ENTRY CONFIG [options] does on this node what a job does on each node.
# Exit code: torchrun's, which is 0 at the end of the run, or after a checkpoint that a signal asked for; 2 for what the
# user can mend here.

node_usage() {
    cat <<USAGE
On every node, in the repository's folder, with the same ENTRY, CONFIG and options, in any order:

    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash $0 ENTRY CONFIG [any option of ENTRY]

  ENTRY          pretrain, pretrain_deepspeed or pretrain_megatron
  NNODES         how many nodes
  NODE_RANK      which one this is, from 0
  MASTER_ADDR    address or name of node 0, as the others reach it
  MASTER_PORT    where node 0 listens; 29500
  NPROC          processes a node, the same on all; as many as there are GPUs, else 1
  NODE_ADDR      this node's address for the others; the one it reaches MASTER_ADDR from
  IFACE          network interface for NCCL's and gloo's sockets; the one of NODE_ADDR
  MAX_RESTARTS   how often this node's ranks may fail and be started again; 10
  JOIN_TIMEOUT   seconds to wait for nodes, at the start and when one is lost; 1800
  RDZV_ID        name of the rendezvous, the same on all; from the output folder
  RDZV_CONF      more for torchrun's --rdzv-conf
  PYTHON         the interpreter; python

--dry-run, or DRY_RUN=1, prints what each node would run, checks config and data, and starts nothing.

Output folder, data and cache must be the same files on all nodes; checkpoints are shared. Logs of all ranks are in
OUTPUT/logs/NAME-NODE_RANK. SIGUSR1, SIGTERM or Ctrl-C at this script on any node: all ranks save a checkpoint after
the present step and leave, on all nodes; a second SIGTERM or Ctrl-C does not wait for it.

A node that is lost (not node 0) comes back with the same command, on the same host or another one: the ranks on all
nodes then start again and go on from the newest checkpoint. Until then the others wait. Node 0 keeps the list of
nodes: when it is lost the job ends everywhere, and the same command on all nodes goes on from the newest checkpoint.
Nodes judge by the clock who is alive, so clocks may differ by a few seconds at most.
USAGE
}

node_error() {
    echo "error: $*; see bash $0 --help" >&2
    exit 2
}

node_note() {
    echo "node ${NODE_RANK:-?}: $*" >&2
}

node_check_words() {  # ENTRY CONFIG
    case ${1:-} in
        -h | --help) node_usage; exit 0 ;;
        pretrain | pretrain_deepspeed | pretrain_megatron) ;;
        *) node_error "the first word is '${1:-}', not pretrain, pretrain_deepspeed or pretrain_megatron" ;;
    esac
    case ${2:-} in
        -h | --help) node_usage; exit 0 ;;
        '') node_error "give a CONFIG, as in launch/configs/olmoe-1b-7b.toml" ;;
    esac
}

node_number() {  # NAME LEAST: the variable is a whole number, not below LEAST
    [[ ${!1:-} =~ ^[0-9]{1,9}$ ]] || node_error "$1 is '${!1:-}', not a whole number"
    [ "${!1}" -ge "$2" ] || node_error "$1 is ${!1}; it must be at least $2"
}

node_check() {
    local name required="NNODES NODE_RANK MASTER_ADDR"
    if [ "$dry_run" ]; then
        # Where nothing starts, any place will do, a login node too.
        NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-ADDRESS_OF_NODE_0}
    fi
    for name in $required; do
        [ "${!name:-}" ] || node_error "set $name"
    done
    PYTHON=${PYTHON:-python}
    command -v "$PYTHON" >/dev/null ||
        node_error "there is no $PYTHON; source launch/environment.sh, activate your environment, or set PYTHON"
    MASTER_PORT=${MASTER_PORT:-29500} MAX_RESTARTS=${MAX_RESTARTS:-10} JOIN_TIMEOUT=${JOIN_TIMEOUT:-1800}
    # The job's own count: it knows every vendor's GPUs, and those that a scheduler hides.
    NPROC=${NPROC:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')} ||
        node_error "$PYTHON cannot import torch, to count GPUs"
    node_number NNODES 1
    node_number NODE_RANK 0
    node_number NPROC 1
    node_number MASTER_PORT 1
    node_number MAX_RESTARTS 0
    node_number JOIN_TIMEOUT 1
    [ "$NODE_RANK" -lt "$NNODES" ] || node_error "NODE_RANK is $NODE_RANK; the last of $NNODES nodes is $((NNODES - 1))"
    [ "$MASTER_PORT" -lt 65536 ] || node_error "MASTER_PORT is $MASTER_PORT; the highest port is 65535"
}

node_read_config() {  # CONFIG [options]: sets `output`, `steps` and `resumes`, as far as they are said
    local found
    found=$("$PYTHON" -c '
import sys, tomllib
path, *options = sys.argv[1:]
try:
    with open(path, "rb") as file:
        config = tomllib.load(file)
except (OSError, ValueError) as error:
    sys.exit(f"error: config {path}: {error}")
for word, following in zip(options, [*options[1:], ""]):
    name, equals, value = word.partition("=")
    if name in ("--output", "--steps", "--resume"):
        config[name[2:]] = value if equals else following
print("resume" in config, config.get("steps", "-"), config.get("output", "runs/default"))' "$@") || exit 2
    read -r resumes steps output <<<"$found"
    steps=${steps#-}
}

node_resolve() {  # NAME: its address, or nothing
    local address=
    read -r address _ < <(getent ahosts "$1" 2>/dev/null) || true
    echo "$address"
}

node_find_network() {  # sets NODE_ADDR and IFACE, where they can be told
    local address remedy="left to torch and NCCL; set NODE_ADDR and IFACE if they choose wrongly"
    [ "$NNODES" -gt 1 ] || return 0
    if ! command -v ip >/dev/null; then
        [ "${NODE_ADDR:-}" ] && [ "${IFACE:-}" ] || node_note "no ip command, so address and interface are $remedy"
        return 0
    fi
    address=$(node_resolve "${NODE_ADDR:-$MASTER_ADDR}")
    if [ -z "${NODE_ADDR:-}" ] && [ "$address" ]; then
        address=$(ip -o route get "$address" 2>/dev/null | sed -n 's/.* src \([^ ]*\).*/\1/p' || true)
    fi
    case $address in
        '')
            node_note "cannot tell how to reach ${NODE_ADDR:-$MASTER_ADDR}, so address and interface are $remedy"
            return 0
            ;;
        127.* | ::1)
            # Hosts files often give a host's own name a loopback address, which is of no use to the others.
            NODE_ADDR=${NODE_ADDR:-$MASTER_ADDR}
            node_note "$NODE_ADDR is a loopback address here, so the interface is $remedy"
            return 0
            ;;
    esac
    NODE_ADDR=${NODE_ADDR:-$address}
    if [ -z "${IFACE:-}" ]; then
        IFACE=$(ip -o addr show to "$address" 2>/dev/null | awk 'NR == 1 { sub(/@.*/, "", $2); print $2 }' || true)
        [ "$IFACE" ] || node_note "no interface has the address $address, so the interface is $remedy"
    fi
}

node_environment() {  # prints NAME=VALUE for each variable that torchrun and the ranks get from here
    local cores
    cores=$(nproc 2>/dev/null || echo 1)
    echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}"
    # The agents' own store, once shared with the ranks, would keep what ranks of an earlier start left there, and the
    # other nodes would look for it where it was first, on a host that may be gone.
    echo "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    if [ "${IFACE:-}" ]; then
        # NCCL takes a bare name for the beginning of one.
        echo "NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$IFACE}"
        echo "GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$IFACE}"
    fi
    if [ "$entry" = pretrain_megatron ]; then
        # Kernels then start in the order in which Megatron issues them, which its overlap counts on.
        echo "CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    fi
}

node_command() {  # NODE_RANK NODE_ADDR NAME CONFIG [options]: sets `command`
    local rank=$1 address=$2 name=$3 host=$MASTER_ADDR is_host=false id
    shift 3
    case $host in *:*) host="[$host]" ;; esac
    [ "$rank" -ne 0 ] || is_host=true
    id=$(basename "$output")
    command=(
        "$PYTHON" -m torch.distributed.run "--nnodes=$NNODES" "--nproc-per-node=$NPROC"
        --rdzv-backend=c10d "--rdzv-endpoint=$host:$MASTER_PORT" "--rdzv-id=${RDZV_ID:-${id//[^A-Za-z0-9_.-]/_}}"
        "--rdzv-conf=is_host=$is_host,join_timeout=$JOIN_TIMEOUT${RDZV_CONF:+,$RDZV_CONF}"
        ${address:+"--local-addr=$address"} "--max-restarts=$MAX_RESTARTS" --monitor-interval=1
        "--log-dir=$output/logs/$name-$rank" --redirects=3 --tee=0:3
        -m "launch.$entry" --config "$@"
    )
}

node_dry_run() {  # CONFIG [options]: prints what each node runs, then lets the entry check what it can
    local rank word line
    for ((rank = 0; rank < NNODES; rank++)); do
        line=
        echo "node $rank:"
        if [ "$rank" -eq "$NODE_RANK" ]; then
            node_environment | sed 's/^/    export /'
            node_command "$rank" "${NODE_ADDR:-}" "$name" "$@"
        else
            IFACE=${IFACE:+INTERFACE_OF_NODE_$rank} node_environment | sed 's/^/    export /'
            node_command "$rank" "${NODE_ADDR:+ADDRESS_OF_NODE_$rank}" "NAME_OF_NODE_$rank" "$@"
        fi
        for word in "${command[@]}"; do
            [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || printf -v word %q "$word"
            line+=" $word"
        done
        echo "   $line"
    done
    NNODES=$NNODES NPROC=$NPROC "$PYTHON" -m "launch.$entry" --dry-run --config "$@"
}

node_await_host() {  # until node 0 listens
    local deadline=$((SECONDS + JOIN_TIMEOUT))
    # torchrun would give up after a minute, and a host that is still booting takes longer.
    # shellcheck disable=SC2016  # expanded by the inner shell
    until timeout 5 bash -c ': >"/dev/tcp/$0/$1"' "$MASTER_ADDR" "$MASTER_PORT" 2>/dev/null; do
        [ "$SECONDS" -lt "$deadline" ] || {
            node_note "nothing listens at $MASTER_ADDR:$MASTER_PORT after $JOIN_TIMEOUT s: start node 0, or set" \
                "MASTER_ADDR to what this node reaches it by"
            exit 1
        }
        sleep 1
    done
}

node_children() {  # PID: the processes it started, whichever of its threads did
    cat "/proc/$1/task"/*/children 2>/dev/null || ps -o pid= --ppid "$1" 2>/dev/null || true
}

node_catches_usr1() {  # PID
    local key mask
    while read -r key mask; do
        [ "$key" = SigCgt: ] && break
    done 2>/dev/null <"/proc/$1/status" || return 1
    ((16#${mask: -8} >> 9 & 1))
}

node_supervise() {  # runs `command`; returns its exit code
    local agent pause rank code=0 idle=0 ranks="" told=" " warned="" stops=0 giving_up="" tied=()
    # torchrun dies of SIGUSR1, and at a SIGTERM it gives its ranks half a minute: too little for a large checkpoint.
    # So this shell takes the signals, and tells the ranks alone.
    trap 'warned=1' USR1
    trap 'warned=1; stops=$((stops + 1))' TERM INT HUP
    # Ranks die with torchrun, and it with this shell, where util-linux is there to see to it.
    if setpriv --pdeathsig KILL true 2>/dev/null; then
        tied=(setpriv --pdeathsig KILL)
    fi
    # In a process group of its own, so that Ctrl-C does not reach it.
    set -m
    (
        trap '' USR1
        exec "${tied[@]}" "${command[@]}"
    ) &
    agent=$!
    set +m
    while kill -0 "$agent" 2>/dev/null; do
        # A signal to all processes of a job, as Slurm's and Ctrl-C may be, ends this subshell too.
        ranks=$(node_children "$agent") || continue
        [ "$ranks" ] && idle=0 || idle=$((idle + 1))
        if [ "$warned" ] && [ -z "$giving_up" ]; then
            # Each once, and not before it is ready for it: a signal to ranks that still start would be lost.
            for rank in $ranks; do
                if [[ $told != *" $rank "* ]] && node_catches_usr1 "$rank" && kill -USR1 "$rank" 2>/dev/null; then
                    [ "$told" != " " ] || node_note "told to stop: the ranks save a checkpoint and leave"
                    told+="$rank "
                fi
            done
            # Without ranks, while this waits for another node, there is nothing to save.
            if [ "$stops" -ge 2 ] || { [ "$told" = " " ] && [ "$idle" -ge 5 ]; }; then
                giving_up=1
                node_note "told to stop: leaving without a new checkpoint"
                kill -TERM "$agent" 2>/dev/null || true
            fi
        fi
        sleep 1 &
        pause=$!
        wait "$pause" || true
    done
    wait "$agent" || code=$?
    if [ "$code" -gt 128 ]; then
        # What ranks started is in their process groups, and would outlive an agent that was killed.
        for rank in $ranks; do
            kill -KILL -- "-$rank" "$rank" 2>/dev/null || true
        done
    fi
    return "$code"
}

run_node() {  # ENTRY CONFIG [options]
    local entry word dry_run=${DRY_RUN:-} name output steps resumes variables options=() command=()
    node_check_words "$@"
    entry=$1
    shift
    [ -f "launch/$entry.py" ] || node_error "there is no launch/$entry.py here; run this from the repository's folder"
    [ "$dry_run" != 0 ] || dry_run=
    for word in "$@"; do
        if [ "$word" = --dry-run ]; then dry_run=1; else options+=("$word"); fi
    done
    set -- "${options[@]}"
    [ -f "${1:-}" ] || node_error "there is no config ${1:-}"
    node_check
    node_read_config "$@"
    # A node that comes back starts with this same command.
    [ "$resumes" = True ] || set -- "$@" --resume auto
    node_find_network
    name=${SLURMD_NODENAME:-$(uname -n)}
    name=${name%%.*}
    if [ "$dry_run" ]; then
        node_dry_run "$@"
        return
    fi
    mapfile -t variables < <(node_environment)
    export "${variables[@]}"
    node_command "$NODE_RANK" "${NODE_ADDR:-}" "$name" "$@"
    [ "$NODE_RANK" -eq 0 ] || node_await_host
    node_supervise
}
