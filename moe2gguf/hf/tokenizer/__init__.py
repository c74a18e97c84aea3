"""Tokenizers of Hugging Face folders in the terms of a GGUF vocabulary."""
