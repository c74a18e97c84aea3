"""What a command makes: each recipe is one function, read top to bottom."""
