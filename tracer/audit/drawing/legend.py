"""A drawing's legend: what is in it is no part of the graph, and its colours may say on which GPUs a node is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from truedag.tracer.audit.drawing.document import DrawnNode
from truedag.tracer.audit.drawing.grammar import Reading

_LEGEND = re.compile(r"\blegend\b|(?:^|[\s_])(?:color|colour)[\s_]*(?:key|code)\b", re.I)
# A node that is called so may be one of attention's.
_KEY = re.compile(r"^\s*(?:cluster[\s_]*)?key\s*:?\s*$", re.I)


def is_legend(node: DrawnNode) -> bool:
    """Return whether a node explains the drawing."""
    clusters = [cluster.replace("_", " ") for cluster in node.clusters]
    inside = any(_LEGEND.search(cluster) or _KEY.search(cluster) for cluster in clusters)
    return inside or bool(_LEGEND.search(node.label.strip().split("\n", 1)[0]))


def ranks_of_colors(nodes: Iterable[DrawnNode], readings: Mapping[str, Reading]) -> dict[str, tuple[int, ...]]:
    """Return the ranks that a legend gives to colours; a colour that stands for two sets of them says nothing."""
    told: dict[str, set[tuple[int, ...]]] = {}
    for node in nodes:
        ranks = readings[node.id].numbers.get("ranks")
        if node.color and ranks:
            told.setdefault(node.color, set()).add(ranks)
    return {color: next(iter(ranks)) for color, ranks in told.items() if len(ranks) == 1}
