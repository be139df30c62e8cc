"""The folded DAG as a tree that opens: pass and stage, layer, modules, operators; each level is a DAG.

Theory of operation. A level's parts refine those of the level above, and the quotient of the leaves by each level is
acyclic (`segments.py`). Then any choice of open and closed nodes is a DAG as well: a circle among what is shown, seen
at the level above, would be a circle there, or lie inside one open node and be a circle among its own parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from truedag.tracer.views.page.leaves import Leaves
from truedag.tracer.views.page.segments import Ints, split_parts

_MOST_MODULES = 5  # parts of a module's name that are levels of their own
_MOST_OPERATORS = 40  # operators of one module that stand side by side
_WRAPPERS = ("model", "module")
_SOURCES = {"parameter": "parameters", "input": "inputs", "output": "outputs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Nodes in the order of a walk from the top: a node's leaves are an interval of the leaves.

    Attributes:
        parent: [nodes] place of the node that it is in; -1 at the top.
        depth: [nodes] from 0 on.
        low, high: [nodes] its leaves, high excluded.
        name: [nodes].
        order: [leaves] where each leaf of `Leaves` comes in the walk.
        leaf_node: [leaves in the walk] the node that is this leaf.
    """

    parent: Ints
    depth: Ints
    low: Ints
    high: Ints
    name: list[str]
    order: Ints
    leaf_node: Ints


def build_tree(leaves: Leaves) -> Tree:
    """Build it."""
    paths = _paths(leaves.table)
    src, dst = leaves.edges["src"].to_numpy(), leaves.edges["dst"].to_numpy()
    count = len(paths)
    levels: list[Ints] = []
    above = np.zeros(count, np.int64)
    depth = max(map(len, paths), default=0)
    for level in range(depth):
        names: dict[tuple[int, str], int] = {}
        keys = np.empty(count, np.int64)
        for leaf, path in enumerate(paths):
            # A leaf whose path has ended stands by itself.
            name = path[level] if level < len(path) else f"\0{leaf}"
            keys[leaf] = names.setdefault((int(above[leaf]), name), len(names))
        above = split_parts(keys, src, dst)
        levels.append(above)
    return _walk(paths, levels, leaves.table["label"].to_list())


def _walk(paths: Sequence[Sequence[str]], levels: Sequence[Ints], labels: Sequence[str | None]) -> Tree:
    count = len(paths)
    firsts = []
    for parts in levels:
        first = np.full(int(parts.max(initial=-1)) + 1, count, np.int64)
        np.minimum.at(first, parts, np.arange(count))
        firsts.append(first[parts])
    walk = np.lexsort((np.arange(count), *reversed(firsts)))
    order = np.empty(count, np.int64)
    order[walk] = np.arange(count)
    parent: list[int] = []
    depth: list[int] = []
    low: list[int] = []
    high: list[int] = []
    name: list[str] = []
    leaf_node: list[int] = []
    opened: list[tuple[int, int]] = []  # part and node at each level, of the leaf before
    for place, leaf in enumerate(walk.tolist()):
        path = paths[leaf]
        keep = 0
        while keep < min(len(opened), len(path)) and opened[keep][0] == int(levels[keep][leaf]):
            keep += 1
        del opened[keep:]
        for level in range(keep, len(path)):
            parent.append(opened[-1][1] if opened else -1)
            depth.append(level)
            low.append(place)
            high.append(place + 1)
            name.append(path[level])
            opened.append((int(levels[level][leaf]), len(name) - 1))
        for _, node in opened:
            high[node] = place + 1
        parent.append(opened[-1][1] if opened else -1)
        depth.append(len(path))
        low.append(place)
        high.append(place + 1)
        name.append(labels[leaf] or "unnamed")
        leaf_node.append(len(name) - 1)
    whole = Tree(
        parent=np.array(parent, np.int64),
        depth=np.array(depth, np.int64),
        low=np.array(low, np.int64),
        high=np.array(high, np.int64),
        name=name,
        order=order,
        leaf_node=np.array(leaf_node, np.int64),
    )
    return _join_lone(whole)


def _join_lone(tree: Tree) -> Tree:
    """Join a node that has one node in it with that one."""
    num_children = np.bincount(tree.parent[tree.parent >= 0], minlength=len(tree.name))
    into = np.arange(len(tree.name))
    names = list(tree.name)
    for node in range(len(names)):
        up = int(tree.parent[node])
        if up >= 0 and num_children[up] == 1 and tree.depth[up] > 1:
            into[node] = into[up]
            names[int(into[up])] = f"{names[int(into[up])]} / {tree.name[node]}"
    kept = np.flatnonzero(into == np.arange(len(into)))
    place = np.full(len(into), -1, np.int64)
    place[kept] = np.arange(len(kept))
    parent = np.where(tree.parent[kept] >= 0, place[into[tree.parent[kept]]], -1)
    depth = np.zeros(len(kept), np.int64)
    for node, up in enumerate(parent.tolist()):
        depth[node] = 0 if up < 0 else depth[up] + 1
    return Tree(
        parent=parent,
        depth=depth,
        low=tree.low[kept],
        high=tree.high[kept],
        name=[names[node] for node in kept.tolist()],
        order=tree.order,
        leaf_node=place[into[tree.leaf_node]],
    )


def _paths(table: pl.DataFrame) -> list[list[str]]:
    """Return under which names each leaf is found."""
    steps = table["step"].unique().drop_nulls()
    several = len(steps.filter(steps >= 0)) > 1
    has_stages = bool((table["stage"] >= 0).any())
    columns = ("step", "decode_step", "phase", "stage", "layer", "module", "expert", "kind")
    root = _find_root(table["module"])
    paths = [
        [
            _pass_name(step if several else -1, decode, phase, stage if has_stages else None, kind),
            *_module_names(layer, module, expert, root),
        ]
        for step, decode, phase, stage, layer, module, expert, kind in table.select(columns).iter_rows()
    ]
    labels = table["label"].fill_null("unnamed").to_list()
    crowd = Counter(map(tuple, paths))
    alike = Counter((*path, label) for path, label in zip(paths, labels, strict=True))
    return [
        [*path, f"every {label}"] if crowd[(*path,)] > _MOST_OPERATORS and alike[(*path, label)] > 1 else path
        for path, label in zip(paths, labels, strict=True)
    ]


def _pass_name(step: int, decode: int, phase: str | None, stage: int | None, kind: str) -> str:
    """Name a pass on a stage; None: there are no stages."""
    what = _SOURCES.get(kind) or (f"decode {decode}" if phase == "decode" and decode >= 0 else phase) or "no phase"
    names = [f"step {step}", what] if step >= 0 else [what]
    if stage is not None:
        lone = "across stages" if kind == "collective" else "no stage told"
        names.append(f"stage {stage}" if stage >= 0 else lone)
    return " · ".join(names)


def _find_root(modules: pl.Series) -> int:
    """Return how many modules there are, one in the other, that all others are in: they are no levels."""
    names = [name.split(".") for name in modules.unique().drop_nulls().to_list() if name]
    root = 0
    while True:
        here = {name[root] for name in names if len(name) > root}
        inside = {name[root + 1] for name in names if len(name) > root + 1}
        if len(here) != 1 or not inside or any(name.isdecimal() for name in inside):
            return root
        root += 1


def _module_names(layer: int, module: str | None, expert: int, root: int) -> list[str]:
    names = [] if layer < 0 else [f"layer {layer}"]
    joined: list[str] = []
    for part in _inside([part for part in (module or "").split(".") if part][root:], layer):
        if part.isdecimal() and joined:
            told = f"expert {expert}" if expert >= 0 and "expert" in joined[-1] else f"{joined[-1]} {part}"
            joined[-1] = told
        else:
            joined.append(part)
    return [*names, *joined[:_MOST_MODULES]]


def _inside(parts: list[str], layer: int) -> list[str]:
    """Return the names of a module inside its layer, or inside what wraps the model.

    Where a layer was told, it is the module of that number: of a list called layers, else of any, else of the first.
    """
    if layer < 0:
        while parts and parts[0] in _WRAPPERS:
            parts = parts[1:]
        return parts
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    listed = [place for place in numbers if place and parts[place - 1] == "layers"][-1:]
    own = [place for place in numbers if int(parts[place]) == layer]
    ends = [*listed, *own, *numbers]
    return parts[ends[0] + 1 :] if ends else parts


def name_parts(table: pl.DataFrame) -> pl.Series:
    """Return which part of the model each of `Leaves.table` is of, if no layer of it was told: `blocks 3`, `embedding`.

    That is the first module of a numbered list that it is in, else the outermost module; "" is unknown.
    """
    if (table["layer"] >= 0).any():
        return pl.Series("part", [""] * len(table), dtype=pl.String)
    root = _find_root(table["module"])
    parts = []
    for module in table["module"]:
        names = _module_names(-1, module, -1, root)
        numbered = next((place for place, name in enumerate(names) if name[-1].isdecimal() and " " in name), 0)
        parts.append(" / ".join(names[: numbered + 1]))
    return pl.Series("part", parts, dtype=pl.String)
