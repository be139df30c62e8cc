"""Checks of what is computed."""

from __future__ import annotations

from truedag.tracer.audit.catalogue.check import Check

CHECKS = (
    Check(
        "model.attention",
        "Attention is complete",
        "Norm, QKV projection, scores, softmax, context and output projection, in each layer and on each of its ranks.",
        "Operators of each role for each layer, rank, microbatch and phase against the model.",
        "error",
        "Add the missing part.",
    ),
    Check(
        "model.residual",
        "Residual additions",
        "Each layer adds its input to the output of attention, and that to the output of the feed-forward.",
        "Two additions a layer with two inputs from different nodes.",
        "error",
        "Add the residual: an addition with two inputs.",
    ),
    Check(
        "model.order",
        "Parts follow each other",
        "Softmax reads the scores, a residual its own layer's input, a dispatch the router: the right parts in a wrong "
        "order are another model.",
        "In a drawing: no part of a layer is reached from a later one, edges lead to the same layer or the next, and "
        "gradients are reduced after the backward pass.",
        "error",
        "Turn round what reads what.",
    ),
    Check(
        "model.norm",
        "Norms",
        "A norm stands before attention and before the feed-forward of each layer, and after the last layer.",
        "Norm operators of each layer, rank, microbatch and phase.",
        "error",
        "Add the missing norm.",
    ),
    Check(
        "model.feed-forward",
        "Feed-forward or router and experts",
        "After attention each layer has a feed-forward, or a router, its experts and the aggregation of their outputs.",
        "Operators of each role for each layer, rank, microbatch and phase against the model.",
        "error",
        "Add the missing part.",
    ),
    Check(
        "model.experts",
        "Each expert is complete",
        "An expert is a first layer, an activation and a second layer.",
        "Operators of each role for each layer, expert and rank against the model.",
        "error",
        "Add the missing part of the expert.",
    ),
    Check(
        "model.ends",
        "Embedding, final norm and head",
        "Tokens enter through the embedding on the first stage, and leave through the final norm and the head on the "
        "last.",
        "Operators of these roles on the ranks of the first and of the last stage.",
        "error",
        "Add the missing part.",
    ),
    Check(
        "model.backward",
        "The backward pass",
        "Training goes back through every weight.",
        "Two matrix products of the backward pass for each weight: its own gradient, and that of its input; in a "
        "drawing that does not tell passes apart, any node of that pass.",
        "error",
        "Add the backward pass.",
    ),
    Check(
        "model.cache",
        "Decoding depends on the cache",
        "Each decode step reads keys and values that the prefill and earlier steps wrote, and the token that came out "
        "last.",
        "An edge into each decode step's cache from the step before it, on each rank and layer, or, where steps write "
        "slots of their own, an edge from an earlier step's slots to what reads them; one from its token.",
        "error",
        "Add the dependency on the cache, and on the sampled token.",
    ),
    Check(
        "model.phases",
        "Phases are told apart",
        "Prefill and decode (or forward and backward) have different shapes and communications.",
        "Phases on nodes against those that the workload has.",
        "error",
        "Show each phase, and what leads from one to the next.",
    ),
)
