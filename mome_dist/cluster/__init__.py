"""A look at a cluster before training: what every node has, how fast its ranks compute, how fast its links are."""
