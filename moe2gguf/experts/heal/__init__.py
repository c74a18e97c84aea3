"""A short training of sliced models against the dense model they were cut from."""
