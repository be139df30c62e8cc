"""Hold the native recorder's graph of a program against the Python recorder's.

A TorchDispatchMode changes the program it watches in one way that is allowed here; anything else differs: PyTorch
writes out of place under a mode what it writes in place without (`add_` becomes `add`, in autograd's formulas `zeros`
and `scatter_` become `new_zeros` and `scatter`). The data flows along the same edges.
"""

from collections import Counter

from truedag.tracer.merge.rank_graph import RankGraph

_SAME = {"aten::new_zeros": "aten::zeros"}

Operator = tuple[object, ...]


def operators(graph: RankGraph) -> list[Operator]:
    """What each operator is: name, sizes of what goes in and out, labels."""
    nodes, layouts, labels = graph.nodes, graph.nodes.trace.layouts, graph.nodes.labels
    found: list[Operator] = []
    for i, op in enumerate(nodes.op):
        name = op if op.startswith("c10d::") else _SAME.get(op.rstrip("_"), op.rstrip("_"))
        inputs = tuple(layouts[number].sizes for number in nodes.inputs[i])
        outputs = tuple(layouts[number].sizes for number in nodes.outputs[i])
        found.append((name, inputs, outputs, labels[i]))
    return found


def assert_same_graph(native: RankGraph, python: RankGraph) -> None:
    """The same operators in the same order with the same labels, and the same data edges among them."""
    ours, theirs = operators(native), operators(python)
    for i, (operator, wanted) in enumerate(zip(ours, theirs, strict=False)):
        assert operator == wanted, f"operator {i}: native has {operator}, python has {wanted}"
    assert len(ours) == len(theirs), f"native has {ours[len(theirs) :][:1]}, python {theirs[len(ours) :][:1]} more"
    assert _edges(native) == _edges(python)


def _edges(graph: RankGraph) -> Counter[tuple[int, int, int]]:
    """Edges by position among the operators, outputs after them; what comes from before them comes from -1.

    `new_zeros` takes a tensor to be like, `zeros` does not: those edges of 0 bytes are left out.
    """
    first_output = len(graph.nodes.op)
    flow = graph.flow
    return Counter(
        (max(src, -1), dst, count)
        for src, dst, count in zip(flow.src.tolist(), flow.dst.tolist(), flow.num_bytes.tolist(), strict=True)
        if count or (src >= 0 and (dst >= first_output or graph.nodes.op[dst] != "aten::new_zeros"))
    )
