"""What goes out: a plan becomes a GGUF file, verified and atomic."""
