"""Starting mome_dist: on this machine (`local`), or on a Slurm cluster."""
