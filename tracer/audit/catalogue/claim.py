"""Checks of what is declared."""

from __future__ import annotations

from truedag.tracer.audit.catalogue.check import Check

CHECKS = (
    Check(
        "claim.parameters",
        "Declared parameters",
        "The number of parameters follows from the sizes.",
        "Sum over all parameter shapes against the declared number; 10 % apart is a fault.",
        "error",
        "Correct the number, or the sizes.",
    ),
    Check(
        "claim.gpus",
        "Declared GPUs",
        "The number of GPUs is the product of the axes.",
        "Declared GPUs, GPU lists and groups against the world size.",
        "error",
        "Correct the number, or the strategy.",
    ),
    Check(
        "claim.groups",
        "Declared groups",
        "An axis of size n over w ranks makes w / n groups.",
        "Declared numbers and members of groups against the strategy's.",
        "error",
        "Correct the groups.",
    ),
    Check(
        "claim.sizes",
        "Declared sizes",
        "Layers, widths, heads, experts, batch and sequence are those of the model that runs.",
        "Each declared number against the deployment's.",
        "error",
        "Correct the number, or the deployment.",
    ),
    Check(
        "claim.architecture",
        "The model that is named",
        "A model that has a name has its published sizes.",
        "Declared sizes against the published ones of the model that is named.",
        "error",
        "Use the published sizes, or another name.",
    ),
    Check(
        "claim.memory",
        "Declared memory",
        "Weights, and in training gradients and optimizer state, need their share of memory on each GPU.",
        "Declared bytes a GPU against those of the parameters that the fullest rank holds, and of what training keeps.",
        "error",
        "Correct the memory.",
    ),
    Check(
        "claim.throughput",
        "Declared throughput",
        "Tokens a second follow from measured times.",
        "Declared tokens a second and time to the first token against the run's, 10 % apart; without a run: unchecked.",
        "error",
        "State what was measured.",
    ),
)
