#!/usr/bin/env bash
""":"
# Train a recipe. This file is valid bash and valid Python, so that each of these works, from any folder:
#
#   deepspeed launch/train.sh [--config RECIPE] [section.key=value ...]
#   deepspeed --num_gpus 2 --no_python launch/train.sh ...
#   bash launch/train.sh ...          (launch.ranks in the recipe sets the number of processes)
#
# Bash reads the line above as the no-op ':', Python as the start of a docstring. Started once per rank by a launcher,
# the Python half runs; started by hand, the shell half starts the launcher.
set -euo pipefail
here="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)"
root="$(dirname "$here")"

# The environment of this clone first, whether or not it is activated; else the python on PATH.
python="${SWIM_PYTHON:-}"
if [ -z "$python" ]; then
  for candidate in "$root/.venv/bin/python" "$(command -v python3 || true)"; do
    if [ -x "$candidate" ]; then python="$candidate"; break; fi
  done
fi
if [ -z "$python" ] || ! "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("deepspeed"))'; then
  echo "error: ${python:-python3} cannot import deepspeed; run 'make env' in $root, or set SWIM_PYTHON" >&2
  exit 2
fi

if [ -n "${RANK:-}${OMPI_COMM_WORLD_RANK:-}" ] || { [ -n "${SLURM_STEP_ID:-}" ] && [ "${SLURM_NTASKS:-1}" -gt 1 ]; }; then
  exec "$python" -u "$here/train.sh" "$@"
fi

# CPU ranks compute with one thread each: more threads than cores only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
# The program itself reads the recipe and finds a free port; a mistake in the recipe ends here, before any rank starts.
placement="$(PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -m swim.train --placement "$@")"
read -r ranks port <<<"$placement"
exec "$python" -m deepspeed.launcher.runner --num_gpus "$ranks" --master_port "${MASTER_PORT:-$port}" "$here/train.sh" "$@"
: <<'# end of the Python half'
"""
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
runpy.run_module("swim.train", run_name="__main__", alter_sys=True)
# end of the Python half
