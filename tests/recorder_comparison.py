"""Hold the native recorder's graph of a program against the Python recorder's.

A TorchDispatchMode changes the program it watches, in two ways that are named here and allowed; anything else differs.

- PyTorch writes out of place under a mode what it writes in place without (`add_` becomes `add`, in autograd's
  formulas `zeros` and `scatter_` become `new_zeros` and `scatter`). The data flows along the same edges.
- `torch.tensor` allocates, and reads the tensors that it is given, where a mode does not look: its `empty` and its
  `_local_scalar_dense` are nodes of the native recorder only.
"""

from collections import Counter

from truedag.tracer.merge.rank_graph import RankGraph

_SAME = {"aten::new_zeros": "aten::zeros"}
_HIDDEN_IN_TORCH_TENSOR = ("aten::empty", "aten::_local_scalar_dense")

Operator = tuple[object, ...]


def operators(graph: RankGraph) -> list[Operator]:
    """What each operator is: name, sizes of what goes in and out, labels."""
    nodes, layouts = graph.nodes, graph.nodes.trace.layouts
    found: list[Operator] = []
    for i, op in enumerate(nodes.op):
        name = op if op.startswith("c10d::") else _SAME.get(op.rstrip("_"), op.rstrip("_"))
        inputs = tuple(layouts[number].sizes for number in nodes.inputs[i])
        outputs = tuple(layouts[number].sizes for number in nodes.outputs[i])
        found.append((name, inputs, outputs, nodes.labels[i]))
    return found


def assert_same_graph(native: RankGraph, python: RankGraph) -> None:
    """The same operators in the same order with the same labels, and the same data edges among them."""
    ours, theirs = operators(native), operators(python)
    kept: list[int] = []
    for i, operator in enumerate(ours):
        if len(kept) < len(theirs) and operator == theirs[len(kept)]:
            kept.append(i)
        else:
            wanted = theirs[len(kept)] if len(kept) < len(theirs) else "nothing more"
            assert operator[0] in _HIDDEN_IN_TORCH_TENSOR, f"native has {operator}, python has {wanted}"
    assert len(kept) == len(theirs), f"python has {theirs[len(kept)]}, native has nothing more"
    assert _edges(native, kept) == _edges(python, list(range(len(theirs))))


def _edges(graph: RankGraph, kept: list[int]) -> Counter[tuple[int, int, int]]:
    """Edges by position among the kept operators; what comes from anything else comes from -1.

    `new_zeros` takes a tensor to be like, `zeros` does not: those edges of 0 bytes are left out.
    """
    number = {old: new for new, old in enumerate(kept)}
    first_output = len(graph.nodes.op)
    number |= {first_output + i: len(kept) + i for i in range(len(graph.outputs))}
    flow = graph.flow
    return Counter(
        (number.get(src, -1), number[dst], count)
        for src, dst, count in zip(flow.src.tolist(), flow.dst.tolist(), flow.num_bytes.tolist(), strict=True)
        if dst in number and (count or (src in number and graph.nodes.op[dst] != "aten::new_zeros"))
    )
