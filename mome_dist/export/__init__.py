"""What was trained, as a directory for others: weights, model card, and the way back."""
