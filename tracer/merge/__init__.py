"""Afterwards, anywhere: the ranks' traces become one graph.

Read -> nodes -> dataflow -> communications joined -> one clock -> topological ids -> dataset. One module a step, each a
pure function of what the one before gave; `merging.py` puts them in order.
"""
