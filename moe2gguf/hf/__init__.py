"""The folder format: Hugging Face checkpoints read and written."""
