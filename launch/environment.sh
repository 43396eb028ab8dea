# shellcheck shell=bash
# Sets, from `root`: `python`, that of this clone first, whether or not it is activated, else the one on PATH; and
# `modules`, the PYTHONPATH with which it finds swim in a clone that is not installed.
: "${root:?}"
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
# shellcheck disable=SC2034 # for those that source this
modules="$root${PYTHONPATH:+:$PYTHONPATH}"

# Ranks compute with one CPU thread each: more threads than cores only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
