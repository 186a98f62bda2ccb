#!/usr/bin/env bash
# Train any experiment; `mome-dist launch slurm` submits this. Arguments are Hydra overrides:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 slurm/train.sh experiment=quickstart parallel.ep=4
#SBATCH --job-name=mome
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --cpus-per-task=4
#SBATCH --signal=B:USR1@120

source slurm/common.sh || exit 2 # from the root of the checkout, where sbatch was called
run_on_all_nodes "$@"
