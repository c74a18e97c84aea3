"""What comes in: a Hugging Face folder becomes hyper-parameters, a vocabulary and lazy, checked tensors."""
