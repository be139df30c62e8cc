"""Checks of how evenly work is spread."""

from __future__ import annotations

from truedag.tracer.audit.catalogue.check import Check

CHECKS = (
    Check(
        "balance.layers",
        "Stages hold as many layers",
        "The slowest stage sets the pace.",
        "Layers of each stage, largest against smallest.",
        "warning",
        "Give each stage as many layers.",
    ),
    Check(
        "balance.experts",
        "Ranks hold as many experts",
        "The rank with the most experts sets the pace.",
        "Experts of each rank, largest against smallest.",
        "warning",
        "Give each rank as many experts.",
    ),
    Check(
        "balance.tokens",
        "Every token reaches its experts",
        "Each token goes to its top-k experts, no more and no less, where none is dropped.",
        "Rows that the experts of a layer got in a pass against tokens x top-k x ETP.",
        "error",
        "Correct the shapes of the experts, or say which tokens are dropped.",
    ),
)
