"""Checks of a graph as a graph."""

from __future__ import annotations

from truedag.tracer.audit.catalogue.check import Check

CHECKS = (
    Check(
        "structure.cycle",
        "No cycles",
        "A DAG has no cycle: nothing can wait for its own result.",
        "Nodes are numbered so that every edge leads upwards; where that is impossible, one cycle is shown as a path.",
        "error",
        "Remove or turn round an edge of the path.",
    ),
    Check(
        "structure.orphan",
        "No orphans",
        "A node that nothing leads to and nothing leaves has no place in what is computed.",
        "A node without any edge; in a dataset, one that reads a tensor and has no producer and no reader.",
        "error",
        "Connect the node with its producers and consumers, or remove it.",
    ),
    Check(
        "structure.source",
        "Everything that is read was made",
        "A tensor that an operator reads was made by some node, or was there before.",
        "An operator that reads tensors needs an edge from a producer; that each tensor has one is `dimension.edge`'s.",
        "error",
        "Add the edge from the node that makes the tensor.",
    ),
    Check(
        "structure.dangling-edge",
        "Every edge has two ends",
        "An edge to a node that is not there depends on nothing that anybody can see.",
        "Ends of edges that are no nodes; in DOT an end that is only named is a node.",
        "error",
        "Add the node, or remove the edge.",
    ),
    Check(
        "structure.unreachable-output",
        "Outputs follow from inputs",
        "What comes out (the loss, the logits, the next token) must follow from what goes in.",
        "An output without a producer; in a drawing, one that no path leads to from any input.",
        "error",
        "Add the path from the input to the output.",
    ),
    Check(
        "structure.duplicate-edge",
        "No duplicate edges",
        "Two equal edges between the same nodes say one thing twice, and double what is counted along them.",
        "More equal edges (same ends, kind, type) than the reader has inputs of that type; in a drawing, any.",
        "error",
        "Remove the copies.",
    ),
    Check(
        "structure.components",
        "One connected graph",
        "Parts without a connection do not depend on each other; parts of one step do.",
        "Weakly connected components of the nodes that have a role are counted; groups that communicate join ranks.",
        "error",
        "Add the edges that join the parts.",
    ),
)
