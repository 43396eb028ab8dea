#!/usr/bin/env bash
# On every node of a job: DeepSpeed's launcher with the ranks of this node. srun starts it once per node, job.sh sets what
# is the same on all of them. The launcher takes the place of this shell: signals reach it, its exit code is the task's.
set -euo pipefail
trap '' USR1 # SLURM sends it to every process; only the ranks have a handler
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# A collective that fails or takes longer than its limit ends the process, without waiting for the clean-up of a
# communicator that may hang itself.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
# Remember so many of the last collectives of each rank: the default of torch 2.13, while others remember none.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
# Write them to TORCH_FR_DUMP_TEMP_FILE (set by job.sh) when a collective times out: they name the rank that is missing.
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# Say why NCCL failed; without it an error is a number. INFO says also which network it chose.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Bootstrap over a network that reaches other nodes: bridges of containers and virtual machines do not.
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-^lo,docker,virbr}"
# Operators that DeepSpeed compiles are kept on the node: nodes that share the folder race for its lock.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${TMPDIR:-/tmp}/torch_extensions_$(id -u)}"

exec "$SWIM_PYTHON" -m deepspeed.launcher.launch --world_info "$SWIM_WORLD" --node_rank "$SLURM_NODEID" \
  --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$here/../train.sh" "$@"
