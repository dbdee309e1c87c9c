#!/usr/bin/env bash
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@120
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
#   NPROC            ranks of a node (its GPUs; 4 without GPUs)
#   MASTER_PORT      free port of the first node (29500)
#   JOIN_TIMEOUT     seconds to wait for all nodes, at the start and after a failure (300)
#   MAX_RESTARTS     how often all ranks are started again after one of them has failed (0)
#   STOP_TIMEOUT     seconds that ranks have to save when launch.sh is asked to stop (300)
#   LOG_DIR          output of all ranks but the first of each node, which is on its screen (logs)
#   OMP_NUM_THREADS  threads of a rank (its share of the node's cores)
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # macOS has -f since 12.3

fits() { # does Python $1 have the packages, recent enough, and module $2?
  "$1" -c '
import importlib.metadata, importlib.util, sys
for name, least in {"torch": (2, 13), "transformers": (5, 23), "datasets": (5, 2)}.items():
    assert tuple(map(int, importlib.metadata.version(name).split(".")[:2])) >= least
assert importlib.util.find_spec(sys.argv[1])' "$2" 2>/dev/null
}

find_python() { # set $python to one that fits requirements file $1, of which module $2 is part
  for python in python python3 "$here/.venv/bin/python"; do
    fits "$python" "$2" && return
  done
  (
    flock 9 2>/dev/null || true # of several nodes that share this directory one installs
    fits "$python" "$2" && exit
    echo "Installing $1 into $here/.venv; this happens once." >&2
    python3 -m venv "$here/.venv" # also completes one that has no pip
    "$python" -m pip install --quiet --disable-pip-version-check -r "$here/$1"
  ) 9>"$here/.venv.lock"
}

slurm_batch() { # the batch script of a job: launch.sh on each node, and the way back into the queue
  local requeue="" code
  trap 'requeue=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
  # srun does not take --cpus-per-task from sbatch (Slurm 22.05).
  srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash "$here/launch.sh" "$@" &
  while :; do # the signal interrupts wait
    wait "$!" && code=0 || code=$?
    kill -0 "$!" 2>/dev/null || break
  done
  # A preempted job that ends by itself within its grace time is not requeued by Slurm.
  scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]" && requeue=yes
  [[ $requeue ]] || exit "$code"
  [[ " $* " == *" -e "* || " $*" == *" --experiment-name"* ]] ||
    { echo "error: the time is over, and nothing was kept without -e NAME" >&2; exit 1; }
  scontrol requeue "$SLURM_JOB_ID"
}

[[ ${BASH_SOURCE[0]} == "$0" ]] || return 0 # tests/run.sh sources this file for find_python
[[ ${1:-} == --help ]] && exec sed -n '3,/^set/{s/^# \{0,1\}//;/^set/!p;}' "$0"
if [[ ${SLURM_JOB_ID:-} ]]; then
  [[ -f $here/train_llm.py ]] || here=$SLURM_SUBMIT_DIR # sbatch runs a copy of this file
  [[ ${SLURM_STEP_ID:-} ]] || { slurm_batch "$@"; exit; }
  NNODES=$SLURM_STEP_NUM_NODES NODE_RANK=$SLURM_NODEID
  MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
  trap '' USR1 # torchrun would end of it; the ranks listen
fi
((${NNODES:=1} > 1)) || NODE_RANK=0 MASTER_ADDR=localhost MASTER_PORT=0 # any free port
: "${MASTER_ADDR:?is needed with NNODES: the name or address of the node with NODE_RANK 0}"
find_python requirements.txt tqdm
export PET_LOG_DIR=${LOG_DIR:-$here/logs} PET_MAX_RESTARTS=${MAX_RESTARTS:-0} # for torchrun
{ mkdir -p "$PET_LOG_DIR" && [[ -w $PET_LOG_DIR ]]; } ||
  { PET_LOG_DIR=$(mktemp -d); echo "The output of other ranks goes to $PET_LOG_DIR." >&2; }
export PET_SHUTDOWN_TIMEOUT=${STOP_TIMEOUT:-300}
[[ -z $(trap -p HUP) ]] || export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT # under nohup
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or ranks started again would find keys of the others
# FSDP allocates many tensors of different sizes; blocks that can grow leave fewer gaps.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}
exec "$python" /dev/fd/3 "$NNODES" "${NODE_RANK:-0}" "${MASTER_PORT:-29500}" "${NPROC:-0}" \
  "${JOIN_TIMEOUT:-300}" "$MASTER_ADDR" "$here/train_llm.py" "$@" 3<<'PYTHON'
import datetime, os, sys
import torch, torch.distributed as dist, torch.distributed.run as torchrun
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
nodes, node, port, ranks, seconds = map(int, sys.argv[1:6])
host, script, *flags = sys.argv[6:]
ranks = ranks or torch.cuda.device_count() or 4
layout = ["--tp", 2] if torch.cuda.device_count() == 0 and ranks % 2 == 0 else []
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // ranks)))
quiet = ",".join(f"{rank}:3" for rank in range(1, min(ranks, 10)))  # only digits (torch 2.13)
run = ["--nproc-per-node", ranks, "--redirects", quiet or 0, "--local-ranks-filter", 0]
run += ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}"]
run += ["--rdzv-conf", f"is_host={int(node == 0)},join_timeout={seconds}", "--rdzv-id", "train_llm"]
# Ranks are numbered in the order of these names, of which only the first has to be an address.
run += ["--local-addr", f"~{node:05}" if node else host, script, *layout, *flags]
try:  # in the store of node 0's torchrun each node says that it has come
    store = dist.TCPStore(host, port, None, node == 0, datetime.timedelta(0, seconds), False, True)
    store.set(str(node), "")
    torchrun.main([str(word) for word in run])
except RendezvousTimeoutError:
    missing = [n for n in range(nodes) if not store.check([str(n)])]
    who = f"no node with NODE_RANK {missing}" if missing else "none in the place of a lost node"
    sys.exit(f"error: {who} within {seconds} s, of {nodes} nodes")
except (RendezvousError, dist.DistError, AttributeError) as error:  # the last if others end first
    gone = f"node 0 cannot be reached at {host}:{port} or has ended; start all nodes again"
    sys.exit(f"error: {gone if node else error}")
PYTHON
