"""Decoding, word error rates, expert activations and reports of finished runs."""
