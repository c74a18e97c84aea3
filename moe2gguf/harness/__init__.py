"""What it is worth: GGUF files run in llama.cpp, in a child process, and measured."""
