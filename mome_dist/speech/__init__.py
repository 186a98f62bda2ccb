"""From speech to LLM tokens: frozen encoders, Matryoshka compression, projectors, sequence assembly."""
