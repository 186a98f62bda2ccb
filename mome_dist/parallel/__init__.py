"""Process layouts (tensor, pipeline, expert, data parallel) and the start of Megatron-Core and DeepSpeed on them."""
