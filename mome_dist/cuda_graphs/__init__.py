"""Functions of tensors that are captured once and replayed, so that the host asks for all of their kernels at once."""
