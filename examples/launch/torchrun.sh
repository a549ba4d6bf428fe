#!/usr/bin/env bash
# One machine, a process for each GPU (or RANKS of them).
#   bash torchrun.sh --learning_rate 1e-5
set -euo pipefail

exec torchrun --standalone --nproc-per-node "${RANKS:-gpu}" \
    -m pro_kernels train --config "${CONFIG:-run.yaml}" "$@"
