"""Training: the coupling of Megatron-Core and DeepSpeed, the loop, its metrics and its stages."""
