"""The file format: GGUF files read, laid out, written, verified and inspected."""
