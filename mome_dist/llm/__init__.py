"""The frozen language model: its shape, its Megatron-Core form, and the import of Hugging Face weights."""
