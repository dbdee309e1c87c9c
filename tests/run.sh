#!/usr/bin/env bash
# Run all tests, on CPU, without a network: bash tests/run.sh [pytest's flags]
set -euo pipefail
# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
find_python tests/requirements.txt pytest
cd "$here"
export OMP_NUM_THREADS=1
exec "$python" -m pytest "$@"
