#!/usr/bin/env bash
# Train from a fresh clone with one command:
#
#     bash launch.sh [flags of train_llm.py]
#
# Uses the Python that is active if it has what requirements.txt names, else makes .venv beside this
# file. Starts one rank per GPU, or without GPUs 4 CPU ranks as 2 dp x 2 tp. NPROC=8 sets another
# number of ranks.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Does Python $1 have the packages, recent enough, and module $2?
fits() {
  "$1" - "$2" >/dev/null 2>&1 <<'PYTHON'
import importlib.metadata, importlib.util, sys
def version(package):
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])
ok = sys.version_info >= (3, 10) and version("torch") >= (2, 11)
ok = ok and version("transformers") >= (5, 17) and version("datasets") >= (4, 0)
sys.exit(not (ok and importlib.util.find_spec("tqdm") and importlib.util.find_spec(sys.argv[1])))
PYTHON
}

# Set $python to one that fits requirements file $1, of which module $2 is part.
find_python() {
  for python in python python3 "$here/.venv/bin/python"; do
    fits "$python" "$2" && return
  done
  python3 -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
  echo "Installing $1 into $here/.venv; this happens once." >&2
  [[ -x $here/.venv/bin/python ]] || python3 -m venv "$here/.venv"
  "$python" -m pip install --quiet --disable-pip-version-check -r "$here/$1"
}

# tests/run.sh sources this file for the functions above.
[[ ${BASH_SOURCE[0]} == "$0" ]] || return 0

find_python requirements.txt tqdm
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
layout=()
if ((gpus == 0)); then
  ranks=${NPROC:-4}
  ((ranks % 2)) || layout=(--tp 2)
else
  ranks=${NPROC:-$gpus}
fi
threads=$(($(getconf _NPROCESSORS_ONLN) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
  "$here/train_llm.py" ${layout[@]+"${layout[@]}"} "$@"
