"""Doors of a checkout to `mome_dist.launchers`: ``python -m launchers.local``, ``.slurm`` and ``.submitit``."""
