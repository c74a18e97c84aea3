"""What a file is worth: comparisons, speed, expert usage."""
