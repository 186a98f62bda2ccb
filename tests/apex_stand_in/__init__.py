"""A stand-in for NVIDIA's Apex: put this folder on ``sys.path``. Same names and signatures, PyTorch's arithmetic."""
