"""`python -m moe2gguf` is the command `moe2gguf`, where that is not on the path."""

from moe2gguf.cli import main

if __name__ == "__main__":
    main()
