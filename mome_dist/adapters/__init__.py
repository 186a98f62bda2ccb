"""What trains inside the layers of the frozen LLM, beside experts."""
