#!/usr/bin/env bash
#SBATCH --job-name=train_llm
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#
# Train from a fresh clone with one command, on a laptop or on many nodes:
#
#   bash launch.sh [flags of train_llm.py]         one node: a rank per GPU, or 4 CPU ranks as 2 x 2
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash launch.sh --tp 8 ...      on each node, 0 to NNODES-1
#   sbatch --nodes 2 launch.sh --tp 8 -e NAME ...  under Slurm, from the directory of this file
#   srun --ntasks-per-node 1 bash launch.sh ...    the same inside an allocation
#
# Uses the Python that is active if it has what requirements.txt names, else makes .venv beside this
# file. Two minutes before the time limit of a Slurm job the run saves, and with -e the job goes
# back into the queue, to go on where it was. What can be set in the environment:
#
#   NPROC            ranks of a node (its GPUs; 4 without GPUs)
#   MASTER_PORT      free port of the first node, and the next one (29500)
#   JOIN_TIMEOUT     seconds to wait for all nodes, at the start and after a failure (300)
#   MAX_RESTARTS     how often failed ranks are started again (0; 2 with several nodes)
#   LOG_DIR          output of all ranks but rank 0, which is on the screen (logs)
#   OMP_NUM_THREADS  threads of a rank (its share of the node's cores)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Does Python $1 have the packages, recent enough, and module $2?
fits() {
  "$1" - "$2" >/dev/null 2>&1 <<'PYTHON'
import importlib.metadata, importlib.util, sys
least = {"torch": (2, 11), "transformers": (5, 17), "datasets": (4, 0), "tqdm": (4, 0)}
found = {name: importlib.metadata.version(name).split(".")[:2] for name in least}
recent = all(tuple(map(int, found[name])) >= least[name] for name in least)
module = importlib.util.find_spec(sys.argv[1])
sys.exit(not (recent and module and sys.version_info >= (3, 10)))
PYTHON
}

# Set $python to one that fits requirements file $1, of which module $2 is part.
find_python() {
  for python in python python3 "$here/.venv/bin/python"; do
    fits "$python" "$2" && return
  done
  python3 -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
  exec 9>"$here/.venv.lock" # of several nodes that share this directory one installs
  flock 9 2>/dev/null || true
  if fits "$python" "$2"; then
    exec 9>&-
    return
  fi
  echo "Installing $1 into $here/.venv; this happens once." >&2
  [[ -x $here/.venv/bin/python ]] || python3 -m venv "$here/.venv"
  "$python" -m pip install --quiet --disable-pip-version-check -r "$here/$1"
  exec 9>&-
}

# Wait until all nodes are there, or say which are not. Otherwise each would end on its own, minutes
# later, with a traceback that names no node.
meet() {
  "$python" - "$MASTER_ADDR" "$((MASTER_PORT + 1))" "$NNODES" "$NODE_RANK" "$JOIN_TIMEOUT" <<'PYTHON'
import datetime, sys
import torch.distributed as dist
host, (port, nodes, rank, seconds) = sys.argv[1], map(int, sys.argv[2:])
timeout = datetime.timedelta(seconds=seconds)
try:
    store = dist.TCPStore(host, port, None, rank == 0, timeout, wait_for_workers=False)
    store.set(f"here {rank}", "")
    for key in ("here", "seen"):  # node 0 has to stay until all have seen all
        try:
            store.wait([f"{key} {node}" for node in range(nodes)], timeout)
        except dist.DistStoreError:
            missing = [n for n in range(nodes) if not store.check([f"{key} {n}"])]
            sys.exit(f"error: no node with NODE_RANK {missing} within {seconds} s, of {nodes} nodes")
        store.set(f"seen {rank}", "")
        if rank:
            break
except dist.DistError:
    sys.exit(f"error: node 0 cannot be reached at {host}:{port} within {seconds} s")
PYTHON
}

# The batch script of a Slurm job: one launch.sh on each node, and the way back into the queue.
slurm_batch() {
  local requeue="" code step
  trap 'requeue=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
  # srun does not take --cpus-per-task from sbatch (Slurm 22.05).
  srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash "$here/launch.sh" "$@" &
  step=$!
  while :; do # the signal interrupts wait
    wait "$step" && code=0 || code=$?
    kill -0 "$step" 2>/dev/null || break
  done
  # A preempted job that ends by itself within its grace time is not requeued by Slurm.
  scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]" && requeue=yes
  [[ $requeue ]] || exit "$code"
  case " $* " in
    *" -e "* | *" --experiment-name"*) scontrol requeue "$SLURM_JOB_ID" ;;
    *) echo "error: the time is over, and nothing was kept without -e NAME" >&2; exit 1 ;;
  esac
}

# tests/run.sh sources this file for the functions above.
[[ ${BASH_SOURCE[0]} == "$0" ]] || return 0

if [[ ${1:-} == --help ]]; then
  sed -n '/^# Train from/,/^set -/{s/^# \{0,1\}//;/^set -/!p;}' "$0"
  echo "Flags of train_llm.py: python train_llm.py --help"
  exit
fi
if [[ ${SLURM_JOB_ID:-} ]]; then
  # sbatch runs a copy of this file.
  [[ -f $here/train_llm.py ]] || here=$SLURM_SUBMIT_DIR
  [[ ${SLURM_STEP_ID:-} ]] || { slurm_batch "$@"; exit; }
  NNODES=$SLURM_STEP_NUM_NODES NODE_RANK=$SLURM_NODEID
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
  MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000 * 2))}
  trap '' USR1 # for torchrun, which would end of it; the ranks listen
fi
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_PORT=${MASTER_PORT:-29500}
JOIN_TIMEOUT=${JOIN_TIMEOUT:-300} LOG_DIR=${LOG_DIR:-$here/logs}

find_python requirements.txt tqdm
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
layout=()
if ((gpus == 0)); then
  NPROC=${NPROC:-4}
  ((NPROC % 2)) || layout=(--tp 2)
fi
NPROC=${NPROC:-$gpus}
threads=$(($(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) / NPROC))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# FSDP allocates many tensors of different sizes; blocks that can grow leave fewer gaps.
PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-$PYTORCH_CUDA_ALLOC_CONF}
run=(--nproc-per-node "$NPROC" --log-dir "$LOG_DIR")
if ((NNODES == 1)); then
  run+=(--standalone --max-restarts "${MAX_RESTARTS:-0}")
else
  : "${MASTER_ADDR:?is needed with NNODES: the name or address of the node with NODE_RANK 0}"
  meet
  run+=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --max-restarts "${MAX_RESTARTS:-2}")
  run+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id train_llm)
  # Node 0 is where the endpoint is; torchrun would compare names, which can be wrong.
  run+=(--rdzv-conf "is_host=$((NODE_RANK == 0)),join_timeout=$JOIN_TIMEOUT")
  ((NODE_RANK)) || run+=(--local-addr "$MASTER_ADDR")
fi
quiet=""
for ((rank = NODE_RANK == 0; rank < NPROC; rank++)); do quiet+=$rank:3,; done
[[ -z $quiet ]] || run+=(--redirects "${quiet%,}")
exec "$python" -m torch.distributed.run "${run[@]}" \
  "$here/train_llm.py" ${layout[@]+"${layout[@]}"} "$@"
