"""What is made: one layer's MLP becomes expert stacks and a router. Pure arrays."""
