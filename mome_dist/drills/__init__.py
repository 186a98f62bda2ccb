"""Fault drills: things are broken on purpose in a small run, and what it trains must not change."""
