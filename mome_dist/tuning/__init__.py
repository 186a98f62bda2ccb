"""Finding the DeepSpeed settings that make a job's steps shortest, by running it."""
