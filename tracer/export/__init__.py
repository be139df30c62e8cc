"""The graph in the formats of other programs: one module a format. Reads the graph and nothing else."""
