#!/usr/bin/env bash
# Train on a SLURM cluster; a run that is preempted or out of time saves, and is queued again.
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 tools/launch/slurm.sh \
#     --config=configs/olmo2_7b.py --config.dir=/SHARED/runs/olmo2_7b
#
# Submit from the project's folder. Everything after the script's name goes to olmo_jax.train.
# One process per node uses all its GPUs; for one per GPU add --ntasks-per-node=8 --gpus-per-task=1.
# PYTHON=/path/to/python sbatch ... takes another Python than .venv/bin/python.
# config.dir and the token files must be on a file system that all nodes share.
#SBATCH --job-name=olmo_jax
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120

set -u
PREEMPTED=75 # exit code of a run that saved because it was told to stop
told=""

# srun answers a TERM by killing its tasks, so the tasks get the signal from scancel, which leaves
# this script alone.
tell_tasks() {
  told=yes
  echo "slurm.sh: told to stop; asking the run to save"
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap tell_tasks TERM

export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it from sbatch
# The first process to end must not take the others with it: they may still be saving.
srun --kill-on-bad-exit=0 --wait=120 "${PYTHON:-.venv/bin/python}" -m olmo_jax.train "$@" &
step=$!
while # a signal ends the wait, not the run: wait again
  told=""
  wait "$step"
  code=$?
  [[ -n "$told" ]]
do :; done

if [[ "$code" -eq "$PREEMPTED" ]]; then
  echo "slurm.sh: saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
