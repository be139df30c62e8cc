"""Every check by its id: what it means, how it decides, how grave a finding is, and what mends it."""

from __future__ import annotations

from dataclasses import dataclass

from truedag.tracer.audit.findings import Severity


@dataclass(frozen=True, slots=True)
class Check:
    """One kind of fault."""

    id: str
    """As in reports and in ``--explain``; the first word is its chapter."""

    title: str
    """What it looks at, in a few words."""

    meaning: str
    """Why it matters."""

    decision: str
    """How it decides, so that a finding can be checked by hand."""

    severity: Severity
    """Of its findings, unless one says otherwise."""

    fix: str
    """What to do, unless a finding says it more exactly."""


_ALL = (
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
        "Each tensor among an operator's inputs needs an edge from a producer, of the same type.",
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
    Check(
        "strategy.world-size",
        "The axes multiply to the number of ranks",
        "The product of the parallel sizes is the number of ranks, in the notation's meaning.",
        "Product of the sizes against the declared number of GPUs and the ranks that are shown.",
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
        "An axis of more than one rank needs its groups or a communication over it.",
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
    Check(
        "communication.tensor",
        "Tensor-parallel communications",
        "A layer that is split over TP ranks is complete only after its all-reduce, or, under sequence parallelism, "
        "between its all-gather and its reduce-scatter.",
        "Communications of attention, feed-forward, embedding, head and loss, counted for each layer, microbatch, "
        "phase and group against what the strategy needs.",
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
        "Where a needed communication is missing and one of another kind is there for the same purpose.",
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
        "Two matrix products of the backward pass for each weight: its own gradient, and that of its input.",
        "error",
        "Add the backward pass.",
    ),
    Check(
        "model.cache",
        "Decoding depends on the cache",
        "Each decode step reads keys and values that the prefill and earlier steps wrote, and the token that came out "
        "last.",
        "An edge into each decode step's cache from the step before it, on each rank and layer; one from its token.",
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
    Check(
        "dimension.edge",
        "What is made is what is read",
        "A reader takes a tensor as its producer made it, or a view of it.",
        "The type on an edge is among the reader's inputs, and is not larger than what the producer wrote.",
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
        "The shape of each rank's parameters against the model's shape divided over the axis.",
        "error",
        "Correct the shard, or the size of the axis.",
    ),
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
        "Labels that say 'representative', 'sample', 'example', and ranks, layers or experts that skip.",
        "error",
        "Draw all of them, or fold them and say which.",
    ),
    Check(
        "honesty.node-count",
        "As many nodes as the strategy implies",
        "Fewer nodes than the strategy has operators cannot show them, unless each says what it stands for.",
        "Number of nodes against operators x ranks of one pass, and against roles x layers where nodes are folded.",
        "error",
        "Draw every operator, or fold by rank class and say what each node stands for.",
    ),
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
        "Weights alone need their share of memory on each GPU.",
        "Declared bytes a GPU against the bytes of the parameters that a rank holds.",
        "error",
        "Correct the memory.",
    ),
    Check(
        "claim.throughput",
        "Declared throughput",
        "Tokens a second follow from measured times.",
        "Declared tokens a second against those of the run; without a run it cannot be checked.",
        "error",
        "State what was measured.",
    ),
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

CHECKS = {check.id: check for check in _ALL}


def explain(check: Check) -> str:
    """Return what a check means and how it decides, as text."""
    return (
        f"{check.id}: {check.title}\n\n{check.meaning}\n\nHow it decides: {check.decision}\n"
        f"Severity: {check.severity}\nWhat to do: {check.fix}\n"
    )
