#!/usr/bin/env bash
# All GPUs of this machine, a process each; without a GPU, two processes on the CPU. PROCESSES=N sets how many.
#   launch/single_node.sh --config configs/cifar10.yaml
#   PROCESSES=4 launch/single_node.sh --config configs/digits.yaml
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

kind=multi_gpu available=$(gpus)
if [ "$available" = 0 ]; then
  kind=cpu available=2
  on_cpu
fi
processes=${PROCESSES:-$available}
prepare "$processes"

launch $kind --num_processes "$processes" "${target[@]}" --expect-world "$processes" "$@"
