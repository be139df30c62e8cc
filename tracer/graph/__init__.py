"""The merged graph as a library: opened, cut, searched, folded, and handed to others. It imports no other part.

`Graph.open(path)` is the way in. What a graph is read from is a `TableSource`: a dataset on disk is one.
"""

from truedag.tracer.graph.graph import Graph
from truedag.tracer.graph.source import FORMAT_VERSION, TABLES, TableSource

__all__ = ["FORMAT_VERSION", "TABLES", "Graph", "TableSource"]
