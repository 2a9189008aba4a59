# shellcheck shell=bash disable=SC2154
# What the sbatch scripts of this folder share. Not submitted by itself.

# ---- your environment: the one place to set it up -------------------------------------------------------------
python=()
# module load cuda/12.8
# source /path/to/venv/bin/activate
# source /path/to/miniconda3/etc/profile.d/conda.sh && conda activate NAME
# python=(apptainer exec --nv --bind "$PWD" /path/to/image.sif python)

# Nodes often have no internet: W&B, if tracking.wandb asks for it, writes into the run directory. Afterwards, where
# there is some: distloop sync runs/NAME
export WANDB_MODE=${WANDB_MODE:-offline}

# DISTLOOP_STAGE=/shared/imagenet.tar (or a folder) is copied to each node's own disk first, and read from there.
stage_to=${DISTLOOP_STAGE_TO:-${TMPDIR:-/tmp}/distloop-$SLURM_JOB_ID}
# ---------------------------------------------------------------------------------------------------------------

# The active environment counts, also that in which you submit. If there is none, or conda's base: the .venv here.
active=${VIRTUAL_ENV:-}
if [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then active=$CONDA_DEFAULT_ENV; fi
if [ ${#python[@]} = 0 ]; then
  python=(python)
  if [ -z "$active" ] && [ -x "$home/.venv/bin/python" ]; then python=("$home/.venv/bin/python"); fi
fi

export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} # a checkout need not be installed
export PYTHONHASHSEED=${PYTHONHASHSEED:-0}         # sets of texts have one order on all ranks and in all starts

fail() {
  echo "distloop: $*" >&2
  exit 2
}

# TRAIN=my_train.py sbatch … starts a loop of your own, named as from where you submit. sbatch hands the variable on to
# the job, also when it comes back, unless --export is used: --export=ALL,TRAIN=my_train.py does.
target=(-m distloop.train)
if [ -n "${TRAIN:-}" ]; then
  case $TRAIN in /*) target=("$TRAIN") ;; *) target=("$SLURM_SUBMIT_DIR/$TRAIN") ;; esac
  [ -f "${target[0]}" ] || fail "TRAIN=$TRAIN: there is no file ${target[0]}; without TRAIN, distloop's own loop is started"
fi

problem=$("${python[@]}" -c 'import distloop' 2>&1) ||
  fail "${python[*]} has no distloop (${problem##*$'\n'}): activate the environment that distloop is installed in before" \
    "you submit, or set it up in $home/slurm/common.sh"

# Also beside a step that holds everything, as one on a lost node does: --mem=0 shares its memory.
on_each_node() {
  srun --overlap --mem=0 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "$@"
}

# train ARGUMENTS…: one task per GPU, to the end of the run or of the job's time.
train() {
  local tasks=${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS} gpus=${SLURM_GPUS_ON_NODE:-0} code=0 step
  if [ "$gpus" != 0 ] && [ "$gpus" != "$tasks" ]; then
    fail "$tasks tasks for $gpus GPUs on a node: each GPU needs a task, sbatch --gpus-per-node=$gpus --ntasks-per-node=$gpus"
  fi
  echo "distloop: job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST: a node has $tasks tasks" \
    "and $gpus GPUs, a task has ${SLURM_CPUS_PER_TASK:-1} CPUs; in $PWD"

  if [ -n "${DISTLOOP_STAGE:-}" ]; then
    # shellcheck disable=SC2016 # expanded on the node
    on_each_node bash -c 'mkdir -p "$2" && if [ -d "$1" ]; then cp -r "$1/." "$2"; else tar -xf "$1" -C "$2"; fi' \
      stage "$DISTLOOP_STAGE" "$stage_to" || fail "$DISTLOOP_STAGE could not be copied to $stage_to on all nodes"
    trap 'on_each_node rm -rf "$stage_to"' EXIT
    set -- "$@" --data.root "$stage_to"
  fi

  # srun does not take --cpus-per-task over from sbatch. Each task sees all GPUs of its node's share, so that peers can
  # reach each other. (--gpu-bind=none would take CUDA_VISIBLE_DEVICES away, and with it the share.)
  # Ranks end each other and say why: srun waits for that before it kills what is left.
  SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} srun --kill-on-bad-exit=0 --wait=30 \
    "${python[@]}" -u "${target[@]}" --expect-world "$SLURM_NTASKS" "$@" &
  step=$!
  trap : TERM USR1 USR2 # meant for the ranks; the script outlives them, to hear how they ended
  wait "$step" || code=$?
  while kill -0 "$step" 2>/dev/null; do # a signal ended the wait, not the step
    code=0
    wait "$step" || code=$?
  done

  # A run goes back to the queue if it was stopped by the end of its time, by a preemption, or by a node that is lost
  # (which Slurm may notice minutes later).
  local nodes=answer
  if [ "$code" != 0 ] && ! on_each_node true; then nodes=lost; fi
  if [ "$code" = 0 ] || [ $nodes = lost ]; then
    scontrol show job "$job" | "${python[@]}" -m distloop.commands.requeue $nodes "$@" && scontrol requeue "$job"
  fi
  return "$code"
}
