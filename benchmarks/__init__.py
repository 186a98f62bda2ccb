"""Measurements against peers, each with its command and a committed table; see README.md beside this file."""
