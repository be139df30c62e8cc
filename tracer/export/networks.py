"""GraphML and node-link JSON as networkx reads them, written row by row: networkx itself needs ten times the memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

import polars as pl

from truedag.tracer.export.network import Network

_AT_ONCE = 1 << 15  # rows that are text at once
_GRAPHML = """<?xml version="1.0" encoding="UTF-8"?>
<graphml xmlns="http://graphml.graphdrawing.org/xmlns" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
  xsi:schemaLocation="http://graphml.graphdrawing.org/xmlns http://graphml.graphdrawing.org/xmlns/1.0/graphml.xsd">
<key id="name" for="graph" attr.name="name" attr.type="string"/>
"""
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # XML has no way to write these


def write_graphml(network: Network, path: Path, show: Callable[[str], None]) -> Mapping[str, int]:
    """Write GraphML: for yEd, Gephi, igraph, Cytoscape. What is unknown is left out: GraphML has no null.

    Raises:
        OSError: it cannot be written.
    """
    show("writing GraphML")
    tables = (("node", network.nodes, {"id": "node"}), ("edge", network.edges, {"source": "src", "target": "dst"}))
    with path.open("w", encoding="utf-8") as file:
        file.write(_GRAPHML)
        for element, frame, ends in tables:
            for name, dtype in frame.drop(ends.values()).schema.items():
                told = f'attr.name="{name}" attr.type="{_type(dtype)}"'
                file.write(f'<key id="{element}-{name}" for="{element}" {told}/>\n')
        file.write(f'<graph edgedefault="directed">\n<data key="name">{_to_xml(network.name)}</data>\n')
        for element, frame, ends in tables:
            cells = {name: (f'<data key="{element}-{name}">', "</data>") for name in frame.drop(ends.values()).columns}
            head = [part for end, column in ends.items() for part in (pl.lit(f' {end}="'), pl.col(column), pl.lit('"'))]
            row = pl.concat_str(pl.lit(f"<{element}"), *head, pl.lit(">"), _join(cells, ""), pl.lit(f"</{element}>\n"))
            for lines in _write_rows(frame, row, _to_xml):
                file.writelines(lines)
        file.write("</graph>\n</graphml>\n")
    return _count(network)


def write_node_link(network: Network, path: Path, show: Callable[[str], None]) -> Mapping[str, int]:
    """Write node-link JSON: for networkx itself, and D3. What is unknown is left out.

    Raises:
        OSError: it cannot be written.
    """
    show("writing JSON")
    name = json.dumps(network.name)
    nodes, edges = network.nodes.rename({"node": "id"}), network.edges.rename({"src": "source", "dst": "target"})
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{{"directed": true, "multigraph": true, "graph": {{"name": {name}}}, "nodes": [\n')
        for what, frame in (("nodes", nodes), ("links", edges)):
            if what == "links":
                file.write('], "links": [\n')
            row = pl.concat_str(
                pl.lit("{"), _join({name: (f'"{name}": ', "") for name in frame.columns}, ", "), pl.lit("}")
            )
            separator = ""
            for lines in _write_rows(frame, row, json.dumps):
                file.write(separator + ",\n".join(lines))
                separator = ",\n"
            file.write("\n")
        file.write("]}\n")
    return _count(network)


def _join(cells: Mapping[str, tuple[str, str]], separator: str) -> pl.Expr:
    """Put the columns that a row has between their texts, one after the other."""
    told = [pl.concat_str(pl.lit(before), pl.col(name), pl.lit(after)) for name, (before, after) in cells.items()]
    return pl.concat_str(told, separator=separator, ignore_nulls=True)


def _write_rows(frame: pl.DataFrame, row: pl.Expr, quote: Callable[[str], str]) -> Iterator[list[str]]:
    for part in frame.iter_slices(_AT_ONCE):
        texts = [_quote(part[name], quote) for name, dtype in part.schema.items() if dtype == pl.String]
        yield part.with_columns(texts).select(row).to_series().to_list()


def _quote(texts: pl.Series, quote: Callable[[str], str]) -> pl.Series:
    known = {text: quote(text) for text in texts.unique().drop_nulls().to_list()}
    return texts.replace_strict(known, default=None, return_dtype=pl.String)


def _to_xml(text: str) -> str:
    return escape(_UNWRITABLE.sub("\ufffd", text))


def _type(dtype: pl.DataType) -> str:
    if dtype == pl.String:
        return "string"
    if dtype == pl.Boolean:
        return "boolean"
    return "long" if dtype.is_integer() else "double"


def _count(network: Network) -> Mapping[str, int]:
    return {"num_nodes": len(network.nodes), "num_edges": len(network.edges)}
