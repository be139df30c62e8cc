"""Parse a drawing in a process of its own, under limits: `python -P -m truedag.tracer.audit.drawing.parser FORM FILE`.

What a stranger drew may be huge, deep, broken or malicious, and graphviz's parser is C. So this process sets limits on
itself before it opens the file, writes plain JSON to stdout, and ends; whatever happens to it, its parent only learns
that it failed. Exit code 1 comes with a message on stderr that says what is wrong.

The JSON: {"nodes": [[id, {attribute: text}, [cluster, ...]]], "edges": [[source, target, {attribute: text}]],
"clusters": {id: label}, "graph": {attribute: text}, "directed": bool}; a node's clusters: outermost first.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.parsers import expat

MOST_NODES = 100_000
MOST_EDGES = 500_000
_MOST_BYTES = 128 << 20
_MEMORY_BYTES = 3 << 30
_CPU_S = 60
_DEEPEST = 64
_LONGEST_TEXT = 20_000

# Strings and comments are taken whole, so that only braces of subgraphs are left.
_BRACES = re.compile(r'"(?:[^"\\]|\\.)*+"|//[^\n]*|/\*(?:[^*]|\*(?!/))*+\*/|[{}]', re.S)

Document = dict[str, Any]


class RefusedError(Exception):
    """The drawing cannot be read; the message says why."""


def main(arguments: list[str]) -> int:
    """Parse one file; return the exit code."""
    form, path = arguments
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        document = _PARSERS[form](_read(Path(path)))
        if not document["nodes"]:
            raise RefusedError("it has no node")
        sys.stdout.write(json.dumps(document))
    except RefusedError as refusal:
        sys.stderr.write(str(refusal))
        return 1
    except MemoryError:
        sys.stderr.write(f"it needs more than {_MEMORY_BYTES >> 30} GiB to be read")
        return 1
    except RecursionError:
        sys.stderr.write("it is nested too deeply")
        return 1
    return 0


def _read(path: Path) -> str:
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise RefusedError(f"it is {size:,} bytes; the most is {_MOST_BYTES:,}")
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise RefusedError("it is UTF-16: save it as UTF-8")
    if b"\0" in data:
        raise RefusedError("it has zero bytes: it is no text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"charset" in data[:4096].lower() or b"latin" in data[:4096].lower():
            return data.decode("latin-1")
        raise RefusedError(f"byte {error.start} is no UTF-8: save it as UTF-8") from error


def parse_dot(text: str) -> Document:
    """Parse any DOT that graphviz reads."""
    deepest, num_graphs = _braces(text)
    if deepest > _DEEPEST:
        raise RefusedError(f"subgraphs are nested deeper than {_DEEPEST}")
    if num_graphs > 1:
        raise RefusedError(f"it holds {num_graphs} graphs: give each a file of its own")
    if text.count("{") > MOST_NODES:
        raise RefusedError(f"it has more than {MOST_NODES:,} subgraphs")
    if text.count("->") + text.count("--") > MOST_EDGES or text.count("\n") + text.count(";") > 4 * MOST_EDGES:
        raise RefusedError(f"it has more than {MOST_EDGES:,} edges")
    import pygraphviz

    try:
        graph = pygraphviz.AGraph(string=text)
    except (ValueError, pygraphviz.DotError) as error:
        raise RefusedError(
            f"it is no DOT: {str(error).splitlines()[0] if str(error) else 'graphviz cannot parse it'}"
        ) from error
    _bound(graph.number_of_nodes(), graph.number_of_edges())
    defaults = _attributes(graph.node_attr)
    nodes: dict[str, tuple[dict[str, str], list[str]]] = {
        str(node): (defaults | _attributes(node.attr), []) for node in graph.nodes_iter()
    }
    clusters: dict[str, str] = {}
    pending = [graph]
    numbered = 0
    while pending:
        outer = pending.pop(0)
        for inner in outer.subgraphs_iter():
            numbered += 1
            name = str(inner.name) if inner.name else f"subgraph {numbered}"
            clusters[name] = _attributes(inner.graph_attr).get("label", "")
            for node in inner.nodes_iter():
                told = nodes[str(node)][1]
                if len(told) < _DEEPEST:
                    told.append(name)
            pending.append(inner)
    edges = [[str(edge[0]), str(edge[1]), _attributes(edge.attr)] for edge in graph.edges_iter()]
    return {
        "nodes": [[name, attributes, inside] for name, (attributes, inside) in nodes.items()],
        "edges": edges,
        "clusters": clusters,
        "graph": _attributes(graph.graph_attr),
        "directed": graph.is_directed(),
    }


def _braces(text: str) -> tuple[int, int]:
    """Return how deep braces are nested, and how many pairs stand outside of all others; those in strings are none."""
    deepest = depth = outermost = 0
    for match in _BRACES.finditer(text):
        if match.group() == "{":
            outermost += depth == 0
            depth += 1
            deepest = max(deepest, depth)
        elif match.group() == "}":
            depth = max(0, depth - 1)
    return deepest, outermost


def _attributes(told: Any) -> dict[str, str]:
    return {str(key): str(value)[:_LONGEST_TEXT] for key, value in told.items() if value not in (None, "")}


def _bound(num_nodes: int, num_edges: int) -> None:
    if num_nodes > MOST_NODES:
        raise RefusedError(
            f"it has {num_nodes:,} nodes; the most that is read is {MOST_NODES:,}: fold it by rank class"
        )
    if num_edges > MOST_EDGES:
        raise RefusedError(f"it has {num_edges:,} edges; the most that is read is {MOST_EDGES:,}")


def parse_graphml(text: str) -> Document:
    """Parse GraphML, without any entity: a document type is refused."""
    reader = _GraphML()
    parser = expat.ParserCreate()
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = reader.refuse
    parser.EntityDeclHandler = reader.refuse
    try:
        parser.Parse(text.encode(), True)
    except expat.ExpatError as error:
        raise RefusedError(f"it is no XML: {error}") from error
    if not reader.is_graphml:
        raise RefusedError("it is no GraphML: its first element is another")
    return reader.finish()


# yEd's elements inside a node or an edge: the attribute that says how it is drawn, and graphviz's name for it.
_YED = {"Shape": ("type", "shape"), "Fill": ("color", "fillcolor"), "LineStyle": ("type", "style")}


class _GraphML:
    """Collects nodes, edges and their data while the parser goes through the file."""

    def __init__(self) -> None:
        self.document: Document = {"nodes": [], "edges": [], "clusters": {}, "graph": {}, "directed": True}
        self.is_graphml = False
        self._keys: dict[str, str] = {}
        self._path: list[str] = []
        self._open: list[dict[str, str]] = []
        self._inside: list[str] = []
        self._key: str | None = None
        self._text: list[str] = []

    def refuse(self, *_declaration: Any) -> None:
        """Refuse document types and entities."""
        raise RefusedError("it declares a document type or entities, which are not read")

    def start(self, name: str, told: dict[str, str]) -> None:
        """An element begins."""
        tag = name.rpartition(":")[2]
        self._path.append(tag)
        if len(self._path) > 3 * _DEEPEST:
            raise RefusedError(f"elements are nested deeper than {3 * _DEEPEST}")
        self.is_graphml = self.is_graphml or tag == "graphml"
        if tag == "key":
            self._keys[told.get("id", "")] = told.get("attr.name", told.get("yfiles.type", told.get("id", "")))
        elif tag == "graph":
            self.document["directed"] = told.get("edgedefault", "directed") == "directed"
        elif tag == "node":
            attributes: dict[str, str] = {}
            self.document["nodes"].append([told.get("id", ""), attributes, list(self._inside)])
            self._open.append(attributes)
            self._inside.append(told.get("id", ""))
        elif tag == "edge":
            attributes = {}
            self.document["edges"].append([told.get("source", ""), told.get("target", ""), attributes])
            self._open.append(attributes)
        elif tag in _YED and self._open and _YED[tag][0] in told:
            self._open[-1][_YED[tag][1]] = told[_YED[tag][0]]
        elif tag == "data":
            self._key = self._keys.get(told.get("key", ""), told.get("key", ""))
            self._text = []
        if len(self.document["nodes"]) > MOST_NODES or len(self.document["edges"]) > MOST_EDGES:
            _bound(len(self.document["nodes"]), len(self.document["edges"]))

    def text(self, characters: str) -> None:
        """Text between elements."""
        if self._key is not None and sum(map(len, self._text)) < _LONGEST_TEXT:
            self._text.append(characters)

    def end(self, name: str) -> None:
        """An element ends."""
        tag = name.rpartition(":")[2]
        self._path.pop()
        if tag == "data" and self._key is not None:
            value = "".join(self._text).strip()
            if self._open and value:
                is_label = self._key in ("nodegraphics", "edgegraphics", "text", "name")
                self._open[-1]["label" if is_label else self._key] = value
            self._key = None
        elif tag in ("node", "edge"):
            self._open.pop()
            if tag == "node":
                self._inside.pop()

    def finish(self) -> Document:
        """Return what was read; nodes that hold others are clusters."""
        _refuse_twice(self.document["nodes"])
        outer = {name for _, _, inside in self.document["nodes"] for name in inside}
        held = [node for node in self.document["nodes"] if node[0] in outer]
        self.document["clusters"] = {name: attributes.get("label", "") for name, attributes, _ in held}
        self.document["nodes"] = [node for node in self.document["nodes"] if node[0] not in outer]
        return self.document


def parse_json(text: str) -> Document:
    """Parse networkx's node-link JSON."""
    try:
        # A lone half of a surrogate pair is no character, and could not be printed.
        told = json.loads(text)
        json.dumps(told, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RefusedError("it holds half of a surrogate pair, which is no character") from error
    except ValueError as error:
        raise RefusedError(f"it is no JSON: {error}") from error
    if isinstance(told, dict) and isinstance(told.get("elements"), dict):
        told = _of_cytoscape(told["elements"])
    if not isinstance(told, dict) or not isinstance(told.get("nodes"), list):
        raise RefusedError('it is no node-link JSON: it needs a list "nodes" and a list "links" or "edges"')
    links = told.get("links", told.get("edges", []))
    if not isinstance(links, list):
        raise RefusedError('its "links" are no list')
    _bound(len(told["nodes"]), len(links))
    nodes = []
    for node in told["nodes"]:
        if not isinstance(node, dict) or ("id" not in node and "name" not in node):
            raise RefusedError('a node without an "id"')
        nodes.append([str(node["id"] if "id" in node else node["name"]), _flat(node, "id"), []])
    _refuse_twice(nodes)
    edges = []
    links = [_ends_named(link) for link in links]
    for link in links:
        if not isinstance(link, dict) or "source" not in link or "target" not in link:
            raise RefusedError('a link without "source" and "target"')
        edges.append([str(link["source"]), str(link["target"]), _flat(link, "source", "target", "key")])
    _number_ends(links, nodes, edges)
    graph = told.get("graph")
    return {
        "nodes": nodes,
        "edges": edges,
        "clusters": {},
        "graph": _flat(graph) if isinstance(graph, dict) else {},
        "directed": bool(told.get("directed", True)),
    }


def _of_cytoscape(elements: dict[str, Any]) -> dict[str, Any]:
    """Return Cytoscape's JSON as node-link JSON: each element's own data."""
    lists = (elements.get("nodes"), elements.get("edges"))
    nodes, links = (
        [one.get("data") if isinstance(one, dict) else one for one in some] if isinstance(some, list) else []
        for some in lists
    )
    return {"nodes": nodes, "links": links}


def _ends_named(link: Any) -> Any:
    """Call the ends of a link source and target; others call them from and to."""
    if isinstance(link, dict) and "source" not in link and "from" in link and "to" in link:
        others = {key: value for key, value in link.items() if key not in ("from", "to")}
        return {"source": link["from"], "target": link["to"], **others}
    return link


def _refuse_twice(nodes: list[list[Any]]) -> None:
    """Refuse nodes of one id: which of them an edge means is not said."""
    counts = Counter(node[0] for node in nodes)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        more = f" and {len(twice) - 1:,} more ids" if len(twice) > 1 else ""
        raise RefusedError(
            f"{counts[twice[0]]:,} nodes have the id {twice[0][:80]!r}{more}: give each node an id of its own"
        )


def _number_ends(links: list[Any], nodes: list[list[Any]], edges: list[list[Any]]) -> None:
    """Older node-link files name the ends of a link by their place in the list of nodes."""
    ends = [end for link in links for end in (link["source"], link["target"])]
    ids = {node[0] for node in nodes}
    if not ends or any(type(end) is not int or not 0 <= end < len(nodes) or str(end) in ids for end in ends):
        return
    for link, edge in zip(links, edges, strict=True):
        edge[:2] = [nodes[link["source"]][0], nodes[link["target"]][0]]


def _flat(told: dict[str, Any], *without: str) -> dict[str, str]:
    return {str(key): _as_text(value) for key, value in told.items() if key not in without and value is not None}


def _as_text(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:_LONGEST_TEXT]


_PARSERS = {"dot": parse_dot, "graphml": parse_graphml, "json": parse_json}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
