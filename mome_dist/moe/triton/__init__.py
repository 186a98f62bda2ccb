"""A MoME layer's routing, gates and GELU as one Triton kernel forward and one backward."""
