"""Checks of what ranks exchange."""

from __future__ import annotations

from truedag.tracer.audit.catalogue.check import Check

CHECKS = (
    Check(
        "communication.tensor",
        "Tensor-parallel communications",
        "A layer that is split over TP ranks is complete only after its all-reduce, or, under sequence parallelism, "
        "between its all-gather and its reduce-scatter.",
        "Communications of attention, feed-forward, embedding, head and loss, counted for each layer, microbatch, "
        "phase and group against what the strategy needs. In a drawing an all-reduce stands for the reduce-scatter and "
        "the all-gather of sequence parallelism, with which it is equal in bytes, if no region is drawn with those; "
        "the sum of the norms' gradients over TP is then not needed either.",
        "error",
        "Add the missing tensor-parallel communication.",
    ),
    Check(
        "communication.dispatch",
        "Dispatch of tokens to experts",
        "With expert parallelism tokens go to their experts' ranks by an all-to-all before the experts run.",
        "Dispatch all-to-alls (tokens, routing weights, and the counts before them) for each layer, microbatch, phase "
        "and EP group.",
        "error",
        "Add the all-to-all between the router and the experts.",
    ),
    Check(
        "communication.combine",
        "Combination of the experts' outputs",
        "What experts computed goes back to the ranks of the tokens by a second all-to-all.",
        "Combine all-to-alls for each layer, microbatch, phase and EP group.",
        "error",
        "Add the all-to-all between the experts and the aggregation.",
    ),
    Check(
        "communication.expert-tensor",
        "Communications within an expert",
        "An expert that is split over ETP ranks gathers its tokens and scatters the sum of its outputs.",
        "All-gathers and reduce-scatters over ETP for each layer, microbatch and phase; a backend without the uneven "
        "forms makes one of several broadcasts or reduces, which count in parts.",
        "error",
        "Add the missing communication over ETP.",
    ),
    Check(
        "communication.context",
        "Keys and values over CP",
        "With context parallelism each rank attends to the keys and values of the whole sequence, and their gradients "
        "go back to the ranks that they came from.",
        "Two all-gathers over CP for each layer, microbatch and group, and two reduce-scatters in the backward pass.",
        "error",
        "Add the exchange of keys and values.",
    ),
    Check(
        "communication.pipeline",
        "Stage transfers",
        "Every boundary between stages is crossed by activations, in training by their gradients in the other "
        "direction, and in generation by the sampled tokens.",
        "Messages from each rank to the same rank of the next stage, for each microbatch and direction.",
        "error",
        "Add the missing send and its receive.",
    ),
    Check(
        "communication.unmatched",
        "Each send has its receive",
        "A send without its receive blocks, and so does a receive without its send.",
        "Sends and receives that no message edge joins, and what the merge could not join.",
        "error",
        "Add the other half of the message.",
    ),
    Check(
        "communication.gradient",
        "Each gradient is summed over its replicas",
        "Replicas of a parameter stay equal only if their gradients are summed: dense ones over DP, experts' over EDP, "
        "those of sequence-parallel norms over TP.",
        "Bytes that each group reduces, and how often, against the parameters that its ranks hold.",
        "error",
        "Add the gradient reduction over the right group.",
    ),
    Check(
        "communication.gradient-twice",
        "No gradient is summed twice",
        "A gradient that is summed twice is scaled by the number of replicas once more.",
        "Bytes that each group reduces against the parameters that its ranks hold.",
        "error",
        "Remove the second reduction.",
    ),
    Check(
        "communication.optimizer",
        "Updated parameters are gathered",
        "With a distributed optimizer each rank updates a shard; the shards are gathered before the next forward pass.",
        "All-gathers over the data-parallel groups against the parameters that their ranks hold.",
        "error",
        "Add the all-gather of parameters.",
    ),
    Check(
        "communication.group",
        "On the right ranks",
        "A communication over the wrong ranks mixes what must not be mixed, or leaves somebody out.",
        "Where a needed communication is missing and one of the same purpose is there on other ranks.",
        "error",
        "Use the group that is given under expected.",
    ),
    Check(
        "communication.kind",
        "Of the right kind",
        "A reduce-scatter in the place of an all-reduce leaves each rank with a part; an all-gather does not add.",
        "Where a needed communication is missing and one of another kind is there for the same purpose; in a drawing "
        "that does not tell passes apart, kinds that the deployment has nowhere for what the communication is for.",
        "error",
        "Use the kind that is given under expected.",
    ),
    Check(
        "communication.bytes",
        "Of the right size",
        "Bytes follow from tokens, width and type; a wrong number is a wrong model of time.",
        "Bytes of each participant against tokens x width x bytes of the type, and what all gave against what all got.",
        "error",
        "State the bytes that are given under expected.",
    ),
    Check(
        "communication.extra",
        "Nothing more than is needed",
        "A communication that the strategy does not need costs time, or changes the result.",
        "Communications with a known place that no rule asks for.",
        "error",
        "Remove it, or say what it is for.",
    ),
)
