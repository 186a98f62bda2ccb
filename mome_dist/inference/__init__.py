"""What was trained, loaded into one process to be used."""
