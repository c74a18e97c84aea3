"""What may be done about tensors and experts that an importance matrix has no data for; imports nothing."""

REPAIRS = {
    "none": "refuse",
    "plain": "quantize what has no data without importance",
    "pooled": "an expert without data gets the mean of the tensor's other experts (down: one number for all columns)",
    "ones": "what has no data counts every column alike, as llama.cpp does silently",
}
"""What may be done about matrices that have no data: see `--imatrix-repair`."""
