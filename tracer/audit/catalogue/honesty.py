"""Checks of what a drawing hides."""

from __future__ import annotations

from truedag.tracer.audit.catalogue.check import Check

CHECKS = (
    Check(
        "honesty.ellipsis",
        "Nothing behind an ellipsis",
        "Dots hide what a reader must check; what is folded must say what it stands for and how many.",
        "Nodes and labels with dots, 'etc.', 'and so on', 'similar'.",
        "error",
        "Draw what is hidden, or say how many nodes stand behind it and which.",
    ),
    Check(
        "honesty.sampling",
        "No representatives",
        "Some GPUs, layers or experts drawn for all of them are not the deployment.",
        "Labels that say 'representative', 'sample', 'example'; and no more than a quarter of the ranks on nodes.",
        "error",
        "Draw all of them, or fold them and say which.",
    ),
    Check(
        "honesty.node-count",
        "As many nodes as the strategy implies",
        "Fewer nodes than the strategy has operators cannot show them, unless each says what it stands for.",
        "Number of nodes against half of roles x layers, where all ranks and experts are folded.",
        "error",
        "Draw every operator, or fold by rank class and say what each node stands for.",
    ),
    Check(
        "honesty.steps",
        "Every decode step is drawn, or folded with its count",
        "Steps of decoding that are alike need not be drawn one by one; then one node says which they are, which step "
        "they are like, and how many nodes it stands for.",
        "Nodes of decode steps, and those that say 'decode steps 1-15, each like decode step 0' and 'stands for 5,190 "
        "recorded': the step must be drawn, and the count must be steps x what its nodes stand for (1 where a node "
        "says nothing), on the fold's GPUs if it names some. All steps of the deployment must be there, each once.",
        "error",
        "Draw the step, or correct what the fold says: steps, GPUs and count.",
    ),
)
