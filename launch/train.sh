#!/usr/bin/env bash
#SBATCH --job-name=swim
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
""":"
# Train a recipe. This file is valid bash and valid Python, so that each of these works, from any folder:
#
#   deepspeed launch/train.sh [--config RECIPE] [section.key=value ...]
#   deepspeed --num_gpus 2 --no_python launch/train.sh ...
#   bash launch/train.sh ...          (launch.ranks in the recipe sets the number of processes)
#   sbatch --nodes 2 launch/train.sh ...   (also by bash inside salloc; launch/slurm/submit.sh has more)
#   srun --ntasks-per-node 8 launch/train.sh ...   (one task for each rank)
#
# Bash reads the line above as the no-op ':', Python as the start of a docstring. Started once per rank by a launcher,
# the Python half runs; started by hand, the shell half starts the launcher.
set -euo pipefail
trap '' USR1 # for the ranks: launchers inherit that it is ignored, the program sets a handler
here="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)"
if [ ! -e "$here/environment.sh" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  # sbatch runs a copy of this file; SLURM knows where it lies, and prints the arguments behind it; of an
  # array it shows all jobs.
  script="$(scontrol show job "$SLURM_JOB_ID" | awk '!seen && sub(/^ *Command=/, "") { print; seen = 1 }')"
  here="$(dirname "$(readlink -f "${script%" $*"}")")"
fi
root="$(dirname "$here")"
# shellcheck source=launch/environment.sh
. "$here/environment.sh"

# Steps of srun count from 0; what SLURM starts by itself, such as an interactive shell, has the largest numbers.
step=0
if [ "${SLURM_STEP_ID:-4294967295}" -lt 4294967280 ]; then step=1; fi
if [ -n "${RANK:-}${OMPI_COMM_WORLD_RANK:-}" ] || { [ "$step" = 1 ] && [ "${SLURM_NTASKS:-1}" -gt 1 ]; }; then
  exec "$python" -u "$here/train.sh" "$@"
fi
if [ -n "${SLURM_JOB_ID:-}" ] && [ "$step" = 0 ]; then
  SWIM_PYTHON="$python" exec bash "$here/slurm/job.sh" "$@"
fi

# The program itself reads the recipe and finds a free port; a mistake in the recipe ends here, before any rank starts.
placement="$(PYTHONPATH="$modules" "$python" -m swim.train --placement "$@")"
read -r ranks port _ <<<"$placement"
exec "$python" -m deepspeed.launcher.runner --num_gpus "$ranks" --master_port "${MASTER_PORT:-$port}" "$here/train.sh" "$@"
: <<'# end of the Python half'
"""
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
runpy.run_module("swim.train", run_name="__main__", alter_sys=True)
# end of the Python half
