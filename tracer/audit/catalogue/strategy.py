"""Checks of who runs what."""

from __future__ import annotations

from truedag.tracer.audit.catalogue.check import Check

CHECKS = (
    Check(
        "strategy.world-size",
        "The axes multiply to the number of ranks",
        "The product of the parallel sizes is the number of ranks, in the notation's meaning.",
        "Product of the sizes against the declared number of GPUs; where none is declared, against the deployment's.",
        "error",
        "Change the sizes or the number of GPUs; say which axes are laid over each other.",
    ),
    Check(
        "strategy.ranks",
        "Every rank is there",
        "Each rank of the world runs a part of the model and must be shown.",
        "The ranks on nodes against 0 to the world size - 1.",
        "error",
        "Show the missing ranks, or say which ranks a node stands for.",
    ),
    Check(
        "strategy.axis",
        "Every axis of the strategy is shown",
        "A strategy with expert, tensor, data or pipeline parallelism shows it: by groups, or by their communications.",
        "The ranks on the nodes must stand on every place of each axis of more than one rank.",
        "error",
        "Show the axis: its groups and what they communicate.",
    ),
    Check(
        "strategy.coordinates",
        "Each rank stands where the strategy puts it",
        "A rank's place on each axis decides which layers, experts and shards it holds.",
        "Coordinates of each rank against the strategy's formula.",
        "error",
        "Number the ranks as the strategy does.",
    ),
    Check(
        "strategy.groups",
        "Groups of each axis",
        "The groups of an axis partition the ranks: their number is world size / size of the axis.",
        "Number, size and members of the groups of each axis against the strategy's.",
        "error",
        "Use the groups that are given under expected.",
    ),
    Check(
        "strategy.layers",
        "Layers on their stages",
        "Each layer is on exactly one stage, stages hold contiguous blocks, and all layers are there.",
        "The ranks that run each layer against those of its stage.",
        "error",
        "Put each layer on the ranks of its stage.",
    ),
    Check(
        "strategy.experts",
        "Experts on their ranks",
        "Each expert of each layer is on exactly the ranks that the strategy gives it.",
        "The ranks that run each (layer, expert) against the expert-parallel placement.",
        "error",
        "Show each expert, on the ranks that are given under expected.",
    ),
)
