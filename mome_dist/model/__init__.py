"""A configuration's model: the one-process form, and this rank's part of the distributed one."""
