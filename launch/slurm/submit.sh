#!/usr/bin/env bash
# Check a recipe and submit it as a SLURM job. Paths are those of the current folder, as for every other way to start.
set -euo pipefail
usage="usage: launch/slurm/submit.sh --profile a100|h100|FILE --nodes N --time D-HH:MM:SS
  [--partition P] [--account A] [--gpus N] [--grace SECONDS] [--dry-run] RECIPE [section.key=value ...]

  --profile   launch/slurm/NAME.sbatch, or a file of your own
  --gpus      GPUs of a node, 0 for CPU nodes (launch.ranks then says how many ranks a node has)
  --grace     seconds before the end of --time when the run is told to save (default 300; SLURM may be a minute early)
  --dry-run   check the recipe, print the command, submit nothing"
fail() { echo "error: $*" >&2; echo "$usage" >&2; exit 2; }

here="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)"
root="$(dirname "$(dirname "$here")")"
profile='' nodes='' time='' gpus='' grace='' dry='' options=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) echo "$usage"; exit 0 ;;
    --dry-run) dry=1; shift; continue ;;
    --profile=* | --nodes=* | --time=* | --gpus=* | --grace=* | --partition=* | --account=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --profile | --nodes | --time | --gpus | --grace | --partition | --account) [ $# -gt 1 ] || fail "$1 needs a value" ;;
    -*) fail "unknown option $1" ;;
    *) break ;;
  esac
  case "$1" in
    --profile) profile="$2" ;;
    --nodes) nodes="$2" ;;
    --time) time="$2" ;;
    --gpus) gpus="$2" ;;
    --grace) grace="$2" ;;
    --partition | --account) options+=("$1=$2") ;;
  esac
  shift 2
done
[ -n "$profile" ] || fail "--profile is missing"
[ -n "$time" ] || fail "--time is missing"
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || fail "--nodes '$nodes' is not a number from 1 on"
[[ "$gpus" =~ ^[0-9]*$ ]] || fail "--gpus '$gpus' is not a number"
[[ "$grace" =~ ^[0-9]*$ ]] || fail "--grace '$grace' is not a number of seconds"
[ $# -gt 0 ] || fail "RECIPE is missing"
recipe="$1"
shift
script="$profile"
if [ -e "$here/$profile.sbatch" ]; then script="$here/$profile.sbatch"; fi
[ -f "$script" ] || fail "--profile $profile is neither a file nor one of: $(cd "$here" && echo ?100.sbatch)"

# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh"
placement="$(PYTHONPATH="$modules" "$python" -m swim.train --placement --config "$recipe" "$@")"
read -r _ _ folder <<<"$placement"

if [ -n "$gpus" ]; then options+=("--gpus-per-node=$gpus"); fi
if [ -n "$grace" ]; then options+=("--signal=USR1@$grace"); fi
# One log for all starts of the job, beside what the run writes; % is SLURM's own sign there.
options+=("--job-name=$(basename "$folder")" "--output=${folder//%/%%}/slurm-%j.log")
command=(sbatch "--nodes=$nodes" "--time=$time" "${options[@]}" "$script" --config "$recipe" "$@")
printf '%q ' "${command[@]}"
echo
if [ -n "$dry" ]; then exit 0; fi
command -v sbatch >/dev/null || fail "no sbatch on this machine; submit where SLURM is installed"
mkdir -p "$folder"
exec "${command[@]}"
