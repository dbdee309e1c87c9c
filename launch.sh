#!/usr/bin/env bash
#SBATCH --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@120
# Train from a fresh clone with one command, on a laptop or on many nodes:
#
#   bash launch.sh [flags of train_llm.py]         one node: a rank per GPU, or 4 CPU ranks as 2 x 2
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash launch.sh --tp 8 ...     on each node, 0 to NNODES-1
#   sbatch --nodes 2 launch.sh --tp 8 -e NAME ...  under Slurm, from the directory of this file
#   srun --ntasks-per-node 1 bash launch.sh ...    the same inside an allocation
#
# Takes the Python that is active if it has what requirements.txt names, else makes .venv here. Two
# minutes before a Slurm job's time limit the run saves, and with -e it is queued again. Variables:
#   NPROC            ranks of a node (its GPUs; 4 without GPUs)
#   MASTER_PORT      free port of the first node (29500)
#   MAX_RESTARTS     how often all ranks are started again after one has failed, on one node (0)
#   STOP_TIMEOUT     seconds that ranks have to save when launch.sh is asked to stop (300)
#   OMP_NUM_THREADS  threads of a rank (its share of the node's cores)
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # macOS has -f since 12.3

fits() { # does Python $1 have module $2 and the packages, recent enough? -P: not from this folder
  "$1" -P -c 'import sys; from importlib import metadata; __import__(sys.argv[1])
for name, least in ("torch", (2, 13)), ("transformers", (5, 23)), ("datasets", (5, 2)):
    if tuple(map(int, metadata.version(name).split(".")[:2])) < least: sys.exit(1)' "$2" 2>/dev/null
}

find_python() { # set $python to one that fits requirements file $1, of which module $2 is part
  for python in python python3 "$here/.venv/bin/python"; do
    fits "$python" "$2" && return
  done
  (
    flock 9 2>/dev/null || true # of several nodes that share this directory one installs
    fits "$python" "$2" && exit
    echo "Installing $1 into $here/.venv; this happens once." >&2
    cd "$here"            # because -m looks for modules in the working directory, too
    python3 -m venv .venv # also completes one that has no pip
    "$python" -m pip install --quiet --disable-pip-version-check -r "$1"
  ) 9>"$here/.venv.lock"
}

slurm_batch() { # the batch script of a job: launch.sh on each node, and the way back into the queue
  local again="" code
  trap 'again=yes; scancel --signal=USR1 "$SLURM_JOB_ID"; wait "$!" || true' USR1
  srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    bash "$here/launch.sh" "$@" & # srun does not take --cpus-per-task from sbatch (Slurm 22.05)
  wait "$!" && code=0 || code=$? # the signal interrupts it
  # A preempted job that ends by itself within its grace time is not requeued by Slurm.
  [[ $again ]] || scontrol show job -o "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]" || exit "$code"
  [[ " $*" == *" -e"* || " $* " == *" --experiment-name"[=\ ]* ]] ||
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
nodes=(--standalone --local-addr localhost --max-restarts "${MAX_RESTARTS:-0}")
((${NNODES:-1} == 1)) || nodes=(--nnodes "$NNODES" --master-port "${MASTER_PORT:-29500}"
  --node-rank "${NODE_RANK:?is needed with NNODES: from 0 on, another one on each node}"
  --master-addr "${MASTER_ADDR:?is needed with NNODES: where the node with NODE_RANK 0 is}")
find_python requirements.txt tqdm
export PYTHONSAFEPATH=1 # nor does torchrun take a file here for a module of the same name
count='import torch; print(torch.cuda.device_count(), torch.get_num_threads())'
read -r gpus cores < <("$python" -c "$count")
ranks=${NPROC:-$((gpus ? gpus : 4))}
((gpus || ranks % 2)) || set -- --tp 2 "$@"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
[[ -z $(trap -p HUP) ]] || export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT # under nohup
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or ranks started again would find keys of the others
# FSDP allocates many tensors of different sizes; blocks that can grow leave fewer gaps.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}
exec "$python" -m torch.distributed.run "${nodes[@]}" --nproc-per-node "$ranks" \
  --shutdown-timeout "${STOP_TIMEOUT:-300}" "$here/train_llm.py" "$@"
