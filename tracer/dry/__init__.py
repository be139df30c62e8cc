"""Recording programs whose tensors have no memory, and what one rank's recording says of others."""
