"""Prove a graph by executing it: the same program again, from the graph's nodes and edges alone.

TRACES is a folder of traces that were recorded with their arguments:

    with record("traces/rank-00000.trace", recorder="python", arguments=True):
        ...

Every operator is called again with what its data edges bring it and nothing else, in random orders that keep no other
order; every result must be bitwise what was recorded. Then edges are taken away one at a time, which must be missed.

The exit code is 3 when the graph is not proven.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from truedag.launch.console import Progress, print_json, print_result


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("traces", metavar="TRACES", type=Path, help="the folder of the traces")
    parser.add_argument("--dag", type=Path, metavar="DIR", help="the dataset to prove (default: merged from TRACES)")
    parser.add_argument("--orders", type=int, default=200, metavar="N", help="in how many orders (default: 200)")
    parser.add_argument(
        "--edges", type=int, default=300, metavar="N", help="how many edges to take away (default: 300)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the orders and the edges (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    from truedag.launch.merge import merge_into
    from truedag.tracer.graph import Graph
    from truedag.tracer.replay.proof import prove
    from truedag.tracer.replay.proof_text import describe_proof

    with Progress() as progress, tempfile.TemporaryDirectory() as scratch:
        dag = arguments.dag
        if dag is None:
            dag = Path(scratch) / "dag"
            merge_into(arguments.traces, dag, replace=False, show=progress.show)
        proof = prove(
            Graph.open(dag),
            arguments.traces,
            num_orders=arguments.orders,
            num_removals=arguments.edges,
            seed=arguments.seed,
            progress=progress.show,
        )
    if arguments.json:
        from dataclasses import asdict

        print_json({"is_proven": proof.is_proven, **asdict(proof)})
    else:
        print_result(describe_proof(proof))
    return 0 if proof.is_proven else 3
