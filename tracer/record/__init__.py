"""On every rank: watch the program, write what happened into a trace file."""
