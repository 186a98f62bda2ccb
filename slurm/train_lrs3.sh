#!/usr/bin/env bash
# Train on LRS3 as in the paper; further arguments are Hydra overrides:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 slurm/train_lrs3.sh
#
# The job warns its ranks before the time limit and when it is preempted; they save, and the job goes back into the queue
# and continues (also after the failure of a node). Logs and summary: runs/lrs3/slurm/JOB/.
#SBATCH --job-name=mome-lrs3
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --cpus-per-task=6
#SBATCH --signal=B:USR1@120

source slurm/common.sh || exit 2 # from the root of the checkout, where sbatch was called
run_on_all_nodes experiment=lrs3 "$@"
