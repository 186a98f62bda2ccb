"""Corpora: media codecs, WebDataset shards with random access, synthetic audio-visual speech, noise."""
