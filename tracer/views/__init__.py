"""How a graph looks to a person. Reads the graph and what `analysis` makes of it, and nothing else."""
