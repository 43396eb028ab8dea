#!/usr/bin/env bash
# On the first node of an allocation: start DeepSpeed's launcher on every node, then do what the end of the run asks for.
# launch/train.sh starts this, with the arguments of the run.
#
#   done.json in the run folder     0: a launcher that is killed may exit with 0 as well
#   75: saved, asked to stop        requeued
#   2: a mistake of the user        2
#   TERM to this shell (scancel)    143, not requeued
#   0 without done.json             1 (run.stop_after, or a launcher that was killed)
#   anything else: a rank, a node   requeued
#
# After SWIM_MAX_REQUEUES (default 3) starts in a row without a newer checkpoint the job is not requeued any more.
set -euo pipefail
trap '' USR1
cancelled=
trap 'cancelled=1' TERM
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$(dirname "$here")")"
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh"

# All of it is in functions: bash reads a script as it runs, and this one may change in the days until srun ends.
say() { echo "$(date +%FT%T) job $SLURM_JOB_ID: $*"; }

# Name of the newest complete checkpoint: only those are called step_XXXXXXXX.
newest() {
  local path name=none
  for path in "$folder"/checkpoints/step_[0-9]*; do
    if [ -d "$path" ] && [ ! -L "$path" ]; then name="$(basename "$path")"; fi
  done
  echo "$name"
}

requeue() {
  local count=0 most="${SWIM_MAX_REQUEUES:-3}" job=none counts="$folder/requeues" after
  after="$(newest)"
  if [ "$after" = "$before" ]; then
    if [ -s "$counts" ]; then read -r job count <"$counts"; fi
    if [ "$job" != "$SLURM_JOB_ID" ]; then count=0; fi
    count=$((count + 1))
  fi
  echo "$SLURM_JOB_ID $count" >"$counts"
  if [ "$count" -ge "$most" ]; then
    say "not requeued: $count starts in a row ended without a newer checkpoint than $before (SWIM_MAX_REQUEUES=$most)"
  elif [ "${ENVIRONMENT:-}" != BATCH ]; then
    say "run the same command again to go on"
  else
    # Said before: SLURM ends this shell when it requeues.
    say "requeue: newest checkpoint $after, before it was $before; $count starts in a row without a newer one"
    scontrol requeue "$SLURM_JOB_ID" || say "SLURM does not requeue this job; submit it again to go on"
  fi
}

main() {
  local placement ranks nodes slots world code=0
  placement="$(PYTHONPATH="$modules" "$python" -m swim.train --placement "$@")"
  read -r ranks _ folder <<<"$placement"
  mkdir -p "$folder/ranks"
  before="$(newest)"

  # What DeepSpeed's launcher takes: {"node": [0, 1, ...], ...} in URL-safe base64.
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  slots="$(seq -s, 0 $((ranks - 1)))"
  world="$(printf '"%s":[SLOTS],' "${nodes[@]}")"
  world="{${world%,}}"
  SWIM_WORLD="$(printf %s "${world//SLOTS/$slots}" | base64 --wrap=0 | tr '+/' '-_')"
  # The address by which SLURM itself reaches the node: its name need not resolve.
  MASTER_ADDR="$(scontrol show node "${nodes[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
  # From the job's number: two jobs on a node differ, and all nodes know it. Below the ports that Linux gives out.
  MASTER_PORT="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}"
  # Where each rank writes its last collectives when one of them hangs; torchfrtrace reads the files.
  TORCH_FR_DUMP_TEMP_FILE="$(readlink -f "$folder")/ranks/collectives_"
  SWIM_PYTHON="$python"
  export SWIM_WORLD SWIM_PYTHON MASTER_ADDR="${MASTER_ADDR:-${nodes[0]}}" MASTER_PORT TORCH_FR_DUMP_TEMP_FILE

  say "${#nodes[@]} nodes x $ranks ranks, run folder $folder, newest checkpoint $before, restart ${SLURM_RESTART_COUNT:-0}"
  # --wait: once a node has ended the others have a minute; they save and leave by themselves, and else would wait for it.
  # --cpu-bind=none: one task starts all ranks of a node and must not be bound to the cores of one.
  srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 \
    --cpu-bind=none bash "$here/node.sh" "$@" || code=$?

  if [ -e "$folder/done.json" ]; then
    say "finished: $folder/done.json"
    exit 0
  fi
  say "the ranks ended with $code"
  case "${cancelled:+cancelled}$code" in
    cancelled*)
      # A job that is preempted is requeued by SLURM itself, where the cluster does so.
      say "not requeued from here: told to end (scancel, preemption, or the time limit before the run could listen)"
      exit 143 ;;
    2) exit 2 ;;
    0)
      say "no $folder/done.json: the run is not finished"
      exit 1 ;;
    75) requeue ;;
    *)
      PYTHONPATH="$modules" "$python" -m swim.train.cli doctor "$folder" || true
      requeue ;;
  esac
  exit "$code"
}

main "$@"
