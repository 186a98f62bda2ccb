"""Plans: what a layout needs in memory and how long its step takes, before a single GPU hour is spent."""
