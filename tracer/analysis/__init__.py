"""What a graph says of its run: folded, measured, reported. Reads the graph and nothing else."""
