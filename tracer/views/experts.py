"""Which experts of which layer are on which GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import polars as pl

from truedag.tracer.views.scope import Scope


class ExpertMap:
    """Which experts of which layer are on which ranks; the program told the expert of an operator, or its module.

    Of a graph that is not read whole, one rank of each place on the pipeline's and the experts' axes is read: the
    others in this place hold the same.
    """

    def __init__(self, scope: Scope) -> None:
        """Read it when it is asked for."""
        self._scope = scope

    @cached_property
    def held(self) -> Mapping[int, Mapping[int, tuple[int, ...]]]:
        """For each rank its experts by layer; empty for a model without any."""
        scope = self._scope
        places = scope.by_place
        read = sorted(scope.places) if not scope.is_folded else [ranks[0] for ranks in places.values()]
        nodes = scope.whole.subgraph(ranks=read).nodes if scope.is_folded else scope.whole.nodes
        rows = (
            nodes.filter((pl.col("expert") >= 0) & (pl.col("rank") >= 0))
            .select("rank", "layer", "expert")
            .unique()
            .collect()
            .sort("rank", "layer", "expert")
            .group_by("rank", "layer", maintain_order=True)
            .agg("expert")
        )
        found: dict[int, dict[int, tuple[int, ...]]] = {}
        for rank, layer, experts in rows.iter_rows():
            found.setdefault(rank, {})[layer] = tuple(experts)
        if scope.is_folded:
            for ranks in places.values():
                for rank in ranks:
                    found[rank] = found.get(ranks[0], {})
        return found

    def of_class(self, first: int, layer: int) -> tuple[int, ...]:
        """Return the experts of a layer that the ranks of a class hold."""
        ranks = self._scope.spread([first])
        return tuple(sorted({one for rank in ranks for one in self.held.get(rank, {}).get(layer, ())}))
