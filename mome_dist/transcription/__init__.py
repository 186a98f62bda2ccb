"""What is said in films, recordings and arrays: the Python API, which the commands use themselves."""
