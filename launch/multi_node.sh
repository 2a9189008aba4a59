#!/usr/bin/env bash
# Several machines without a scheduler. The same command on each of them, at about the same time:
#   MASTER_ADDR=10.0.0.1 MACHINES=2 MACHINE_RANK=0 launch/multi_node.sh --config configs/imagenet.yaml
#   MASTER_ADDR=10.0.0.1 MACHINES=2 MACHINE_RANK=1 launch/multi_node.sh --config configs/imagenet.yaml
# MASTER_ADDR: machine 0, as all of them reach it. The run directory (--runs-dir) is one that all of them share.
# PROCESSES: ranks on each machine (its GPUs; two on the CPU). MASTER_PORT: 29500. JOIN_SECONDS: 180.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

for name in MASTER_ADDR MACHINES MACHINE_RANK; do
  [ -n "${!name:-}" ] || fail "$name is not set: the head's address, the number of machines and this one's rank" \
    "(0 to MACHINES-1) are needed, as in: MASTER_ADDR=10.0.0.1 MACHINES=2 MACHINE_RANK=0 $0 …"
done
positive MACHINES
limit=${JOIN_SECONDS:-180}
available=$(gpus)
if [ "$available" = 0 ]; then
  available=2
  on_cpu
fi
processes=${PROCESSES:-$available} port=${MASTER_PORT:-29500}
prepare "$processes"

# Who is missing, and where, before launchers wait for each other without a word.
TORCH_CPP_LOG_LEVEL=FATAL PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} \
  python -m distloop.ranks.meeting "$MASTER_ADDR" "$port" "$MACHINE_RANK" "$MACHINES" "$limit"

world=$((MACHINES * processes))
launch multi_node --num_machines "$MACHINES" --machine_rank "$MACHINE_RANK" --num_processes "$world" \
  --main_process_ip "$MASTER_ADDR" --main_process_port "$port" --rdzv_conf "timeout=$limit" \
  "${target[@]}" --expect-world "$world" "$@"
