"""Running on a Slurm cluster: submission on a login node, and what a job does on its nodes.

``python -m launchers.slurm`` submits ``slurm/train.sh``; every script in ``slurm/`` runs
`mome_dist.launchers.slurm.allocation` on the first node of its allocation. It checks the request and the nodes
(`preflight`), starts one process a rank (`rank`), passes signals on, starts again or requeues the job, and keeps a
record of every try (`tries`).
"""
