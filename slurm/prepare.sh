#!/usr/bin/env bash
# Make a corpus of LRS3, LRS2 or lists of clips: every task of the array does its part, and the last one joins all.
# A task that was killed or preempted goes on where it was. Arguments are those of mome-dist prepare:
#   sbatch --array=0-15 --cpus-per-task=16 --time=12:00:00 slurm/prepare.sh lrs3 /data/lrs3 corpora/lrs3
#SBATCH --job-name=mome-prepare
#SBATCH --output=slurm-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue

source slurm/common.sh || exit 2 # from the root of the checkout, where sbatch was called
exec "$MOME_DIST_PYTHON" -m mome_dist prepare "$@"
