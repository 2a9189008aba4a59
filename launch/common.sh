# shellcheck shell=bash disable=SC2034
# What the scripts of this folder share. Not run by itself.
fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The active environment counts. If there is none, or conda's base, which is often active by itself: the .venv here.
active=${VIRTUAL_ENV:-}
if [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then active=$CONDA_DEFAULT_ENV; fi
if [ -z "$active" ] && [ -x "$home/.venv/bin/accelerate" ]; then
  PATH=$home/.venv/bin:$PATH # made by `make train`, or by you
fi
command -v accelerate >/dev/null ||
  fail "no accelerate here: activate the environment that distloop is installed in (a checkout: \`make setup\`)"

export PYTHONHASHSEED=${PYTHONHASHSEED:-0} # sets of texts have one order on all ranks and in all starts

# TRAIN=my_train.py starts a loop of your own, named as from where you are; `distloop copy` writes one to begin with.
target=("$home/distloop/train.py")
if [ ! -f "${target[0]}" ]; then # no checkout, but a folder that `distloop init` wrote
  target=(-m distloop.train)
  problem=$(python -c 'import distloop' 2>&1) ||
    fail "python has no distloop (${problem##*$'\n'}): activate the environment that distloop is installed in"
fi
if [ -n "${TRAIN:-}" ]; then
  [ -f "$TRAIN" ] || fail "TRAIN=$TRAIN: there is no such file in $PWD; without TRAIN, distloop's own loop is started"
  target=("$TRAIN")
  export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} # a checkout need not be installed
fi

# positive NAME: refuse a variable that is no number from 1.
positive() {
  case ${!1} in '' | 0* | *[!0-9]*) fail "$1=${!1}: give a number from 1" ;; esac
}
if [ -n "${PROCESSES:-}" ]; then positive PROCESSES; fi

# The GPUs that this machine shows to PyTorch.
gpus() { python -c 'import torch; print(torch.cuda.device_count())'; }

# prepare PROCESSES: for so many ranks on this machine.
prepare() {
  # The launcher would give each rank one thread, on a machine of any size.
  local cpus
  cpus=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > $1 ? cpus / $1 : 1))}
  # The launcher hands these signals on, and gives the ranks two minutes to save, not 30 seconds. Under nohup, which
  # ignores a hangup, it must not listen to that one either.
  local hangup=,SIGHUP
  if [ -n "$(trap -p HUP)" ]; then hangup=; fi
  export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT$hangup,SIGQUIT,SIGUSR1,SIGUSR2 PET_SHUTDOWN_TIMEOUT=120
}

# on_cpu: let Accelerate's launcher start ranks without GPUs.
on_cpu() { export ACCELERATE_USE_CPU=true; }

launch() { exec accelerate launch --quiet --config_file "$home/launch/accelerate/$1.yaml" "${@:2}"; }
