"""Checks of shapes."""

from __future__ import annotations

from truedag.tracer.audit.catalogue.check import Check

CHECKS = (
    Check(
        "dimension.edge",
        "What is made is what is read",
        "A reader takes a tensor as its producer made it, or a view of it.",
        "The type on an edge is among the reader's inputs, and is not larger than what the producer wrote; in a "
        "drawing, what a node says that it takes has as many numbers as what its producer says that it gives.",
        "error",
        "Correct the shape.",
    ),
    Check(
        "dimension.operator",
        "Shapes fit the operator",
        "A matrix product of [m,k] and [k,n] is [m,n]; what works element by element keeps the shape.",
        "Output shapes computed from input shapes for products, additions, activations and softmax.",
        "error",
        "Correct the shape.",
    ),
    Check(
        "dimension.shard",
        "Shards make the whole",
        "A split dimension times the size of its axis is the whole dimension.",
        "The shape of each rank's parameters against the model's shape divided over the axis; in a drawing, the last "
        "dimension of what an operator gives.",
        "error",
        "Correct the shard, or the size of the axis.",
    ),
)
