#!/usr/bin/env bash
# Several machines: start this on each of them, with the same variables.
#   HEAD=NAME_OF_THE_FIRST_NODE NODES=2 bash torchrun_nodes.sh --learning_rate 1e-5
set -euo pipefail

: "${HEAD:?name or address of the first node, which all others reach}"
: "${NODES:?how many machines}"

exec torchrun --nnodes "$NODES" --nproc-per-node "${RANKS:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29400}" --rdzv-id "${RUN_ID:-pro-kernels}" \
    -m pro_kernels train --config "${CONFIG:-run.yaml}" "$@"
