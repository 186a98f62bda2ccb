"""What trains, in DeepSpeed's engine: reduction, clipping, the optimiser and its state."""
