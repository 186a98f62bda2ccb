"""The MoME module: router, bottleneck experts, balance losses, and the ways to bring tokens and experts together."""
