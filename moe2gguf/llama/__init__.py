"""llama.cpp, in a child process: load, run, watch."""
