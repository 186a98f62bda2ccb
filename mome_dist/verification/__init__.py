"""Proof that a layout trains the same model as one process: run both, compare every number that matters."""
