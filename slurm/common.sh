# shellcheck shell=bash
# Shared by the scripts of this folder. Submit them from the root of the checkout, on a file system that all nodes mount.
#
# From the environment of sbatch:
#   MOME_DIST_PYTHON     the Python to use (.venv/bin/python of the checkout, else python)
#   MOME_DIST_INTERFACE  network interface of NCCL and gloo, where they choose a wrong one
#   MOME_DIST_BACKEND    gloo: ranks may share a GPU (docs/how-to/slurm.md)
#   MAX_TRIES            failures in a row without a further checkpoint after which the job ends (3)
set -euo pipefail

if [[ -z "${MOME_DIST_PYTHON:-}" ]]; then
    MOME_DIST_PYTHON=python
    [[ ! -x .venv/bin/python ]] || MOME_DIST_PYTHON=.venv/bin/python
fi

# Become the process that watches over all ranks, so that it gets the signals that Slurm sends to this script.
run_on_all_nodes() {
    exec "$MOME_DIST_PYTHON" -m mome_dist.launchers.slurm.allocation "$@"
}
