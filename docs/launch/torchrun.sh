#!/bin/bash
# Elastic training on 1 to 4 machines: run the same line on each, with HEAD the name of one of them. A machine that goes or comes
# starts all ranks again from the last checkpoint, at the new world size. It has to fit the recipe's num_groups (k2 train says so).
#
#     HEAD=node-0 DATA=/data/run OUT=/data/run/train/k2 bash docs/launch/torchrun.sh
#
# With --fsdp 8 behind the last line every machine of 8 GPUs holds a whole copy of the model (HSDP), however many machines there are.
# One machine: leave HEAD out. SIGTERM or SIGUSR1 to torchrun reaches every rank: they write a checkpoint, which may take the
# shutdown timeout, and end.
set -euo pipefail
: "${DATA:?the run folder with packed/}" "${OUT:?the folder of the training run, seen by all machines}"

# One store for each rendezvous: that of torchrun keeps the addresses of ranks that are gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
    --nnodes "${NODES:-1:4}" \
    --nproc-per-node "${GPUS:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:-localhost}:29400" \
    --rdzv-id "${RUN_ID:-k2}" \
    --max-restarts 20 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout 300 \
    -m pipelines.train --data "$DATA" --recipe "${RECIPE:-k2}" --out "$OUT"
