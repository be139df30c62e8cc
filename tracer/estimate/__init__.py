"""What a graph without times would take on a device: estimates, marked as such wherever they go."""
