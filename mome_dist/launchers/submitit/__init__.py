"""Running through Submitit: one job (`task`), or a Hydra sweep as a job array (`sweep`)."""
