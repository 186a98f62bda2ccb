"""DeepSpeed JSON files: what each of their keys does here, and what of a file reaches DeepSpeed."""
