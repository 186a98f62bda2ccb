"""Checkpoints without a layout: global names, safetensors, JSON; written by many ranks, read by any number."""
