#!/usr/bin/env bash
# Word error rates of a run, decoded on all ranks; further arguments are those of mome_dist.evaluate:
#   sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 slurm/eval.sh checkpoint=runs/lrs3 'rates=[avsr(4,2)]'
#SBATCH --job-name=mome-eval
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --cpus-per-task=2
#SBATCH --signal=B:USR1@120

source slurm/common.sh || exit 2 # from the root of the checkout, where sbatch was called
run_on_all_nodes --module mome_dist.evaluate "$@"
