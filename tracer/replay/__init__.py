"""Proof by execution: the graph of a program that was recorded with its arguments is executed again."""
