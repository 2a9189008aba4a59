#!/usr/bin/env bash
# One process, on a GPU if there is one: small and chatty, for looking at a run that goes wrong.
#   launch/debug.sh --config configs/digits.yaml
# 20 steps, each logged; data loaded in the process itself, so that breakpoint() works and tracebacks are whole;
# autograd's anomaly detection names the forward operation behind a NaN; the run directory is a temporary one, without
# W&B and a report; no warm-up, which may be longer than 20 steps. What you add counts over what is set here; for epochs
# add --train.steps null.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"
prepare 1
export CUDA_LAUNCH_BLOCKING=1 PYTHONFAULTHANDLER=1

launch single_gpu "${target[@]}" --expect-world 1 --runs-dir "$(mktemp -d)" \
  --data.workers 0 --train.epochs null --train.steps 20 --schedule.warmup-steps 0 --train.detect-anomaly --log.every-steps 1 \
  --tracking.wandb off --tracking.no-report "$@"
