"""Execute a deployment without its GPUs: the DAG of any world size on this machine, from the very code that runs it.

DEPLOYMENT and key.path=value are as in truedag run. Ranks are executed one after another on tensors that have no
memory, so nothing is computed and nothing is timed; operators, shapes, communications and their sizes are those of a
real run. Ranks that must run the same program are executed once; --verify N also executes N random others and demands
that they do, --all-ranks executes every one. Where the routing gives ranks of a class own sizes, some of them are
executed, and the others' sizes follow from how many tokens they get. The DAG is that of all ranks: it lies on disk once
for each class, and any part of it is made when it is read; --expand writes it out. It is drawn whole, and audited from
its classes; expanded or where routing gives ranks of a class own sizes, up to a million nodes are audited: truedag
audit takes more. --device estimates what it would take on a GPU, and says so, and whether each rank fits into its
memory.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from truedag.launch.console import Progress, print_audited, print_json, print_result, shorten
from truedag.launch.dry import ASSUMED, DryResult, run_dry
from truedag.launch.typed_numbers import natural, positive
from truedag.tracer.analysis.device_fit import NOT_COUNTED, describe_unfit
from truedag.tracer.analysis.quantities import write_bytes, write_runs
from truedag.tracer.estimate.estimate import Estimate


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("deployment", metavar="DEPLOYMENT", help="a name, or the path of a YAML file")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="values to override")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: truedag-out/NAME-dry)")
    parser.add_argument("--force", action="store_true", help="replace the folder of an earlier run")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--routing",
        metavar="HOW",
        default="balanced",
        help="which experts tokens go to: balanced (default), uniform (at random), zipf:ALPHA, or the path of a "
        "recorded routing",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn at random (default: 0)")
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--all-ranks", action="store_true", help="execute every rank, and build their DAG")
    ranks.add_argument(
        "--verify",
        type=natural,
        default=0,
        metavar="N",
        help="also execute N random ranks: they must run as their class",
    )
    parser.add_argument(
        "--expand", action="store_true", help="write all nodes and edges of all ranks, not only those of each class"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="estimate times for this GPU: h100, h200, a100, or the path of a device file"
    )
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="for the estimates (default: 8)")
    parser.add_argument("--no-views", action="store_true", help="draw nothing, and write no page")
    parser.add_argument("--jobs", type=positive, metavar="N", help="ranks executed at a time (default: one a core)")


def execute(arguments: argparse.Namespace) -> int:
    """Run it."""
    with Progress() as progress:
        result = run_dry(
            arguments.deployment,
            arguments.overrides,
            out=arguments.out,
            replace=arguments.force,
            routing=arguments.routing,
            seed=arguments.seed,
            all_ranks=arguments.all_ranks,
            expand=arguments.expand and not arguments.all_ranks,
            device=arguments.device,
            gpus_per_node=arguments.gpus_per_node,
            num_verified=arguments.verify,
            jobs=arguments.jobs,
            views=not arguments.no_views,
            command=sys.argv,
            show=progress.show,
        )
    if arguments.json:
        print_json(TypeAdapter(DryResult).dump_python(result, mode="json"))
    else:
        _print_result(result)
    return 0


_SHOWN_CLASSES = 16
_SHOWN_HELD = 8


def _print_result(result: DryResult) -> None:
    print_result(f"{result.deployment} · {result.strategy}")
    for line in describe_unfit(result.fits):
        print_result(line)
    print_result(f"  not run: executed without memory, so that nothing was timed; {_say_routing(result)}")
    events = {rank.rank: rank for rank in result.ranks}
    num_classes = len(result.classes)
    print_result(f"  {num_classes} rank {'class' if num_classes == 1 else 'classes'} of {result.world_size} ranks:")
    for one in result.classes[:_SHOWN_CLASSES]:
        rank = events[one.representative]
        what = ", ".join(f"{name} {value}" for name, value in one.key)
        sizes = f", of {len(one.alike):,} sizes" if len(one.alike) > 1 else ""
        print_result(
            f"    {what}: {len(one.ranks)} ranks, as rank {one.representative}: {rank.num_events:,} events, "
            f"{rank.seconds:.1f} s, {rank.peak_bytes / 2**20:,.0f} MiB{sizes}"
        )
    if num_classes > _SHOWN_CLASSES:
        print_result(f"    and {num_classes - _SHOWN_CLASSES:,} more, listed in classes.json")
    if result.num_derived:
        num_executed = len(result.ranks) - len(result.verified)
        print_result(
            f"  {num_executed:,} ranks were executed; the sizes of {result.num_derived:,} others follow from their "
            "numbers of tokens"
        )
    if result.verified:
        print_result(f"  verified: {_list(result.verified)} run as their classes do")
    print_result(f"{result.seconds:.0f} s in all.")
    counts = result.merge
    print_result(
        f"The DAG of all ranks is in {shorten(result.dag)}: {counts['num_nodes']:,} nodes, "
        f"{counts['num_edges']:,} edges, {counts['num_collectives']:,} collectives."
    )
    if "num_class_nodes" in counts:
        how = "written out" if result.is_expanded else "made of them where it is asked for (--expand writes it out)"
        print_result(
            f"  from {counts['num_class_nodes']:,} nodes and {counts['num_class_edges']:,} edges of the classes, {how}"
        )
    _print_memory(result)
    if result.estimate is not None:
        _print_estimate(result.estimate)
    if result.audit is not None:
        print_audited(result.audit)
    if result.pictures:
        print_result(f"Drawn: {', '.join(str(shorten(path)) for path in result.pictures)}")
    if result.page is not None:
        print_result(f"Page: {shorten(result.page)}")
    elif result.pictures:
        print_result(
            "No page: with so many ranks, or nodes that are read one by one, it takes minutes and gigabytes; "
            "truedag view writes it all the same"
        )
    if result.not_drawn:
        print_result(f"not drawn: {result.not_drawn}")
    print_result(f"next: {_find_next(result)}")


def _find_next(result: DryResult) -> str:
    """Say what to type: what opens the page or the simplest drawing, or what makes the one that is not there."""
    shown = result.page or next(iter(result.pictures), None)
    if shown is None:
        return f"truedag draw {shlex.quote(str(shorten(result.out)))}"
    return f"{'open' if sys.platform == 'darwin' else 'xdg-open'} {shlex.quote(str(shorten(shown)))}"


def _print_memory(result: DryResult) -> None:
    most = sorted(result.memory, key=lambda one: (-one.peak_bytes, one.ranks))
    if not most:
        return
    of_device = {fit.ranks: f" ({fit.describe()})" for fit in result.fits}
    print_result(f"Memory of a rank, by what lives how long ({NOT_COUNTED}):")
    for one in most[:_SHOWN_CLASSES]:
        print_result(
            f"  {_name_ranks(one.ranks)}: parameters {write_bytes(one.parameter_bytes)}, gradients "
            f"{write_bytes(one.gradient_bytes)}, state {write_bytes(one.state_bytes)}, made in the step "
            f"{write_bytes(one.activation_bytes)}, at most {write_bytes(one.peak_bytes)} together"
            f"{of_device.get(one.ranks, '')}"
        )
    if len(most) > _SHOWN_CLASSES:
        print_result(f"  and {len(most) - _SHOWN_CLASSES:,} more, with less; truedag report lists all")
    first = most[0]
    where = ", ".join(said for said in (first.peak_module, first.peak_phase) if said)
    print_result(
        f"  the most is on {_name_ranks(first.ranks)} at "
        f"{first.peak_op}{f' ({where})' if where else ''}, node {first.peak_node:,}; alive then:"
    )
    for held in first.alive[:_SHOWN_HELD]:
        print_result(f"    {write_bytes(held.num_bytes):>9}  {held.describe()}, {held.num:,} pieces")


def _print_estimate(found: Estimate) -> None:
    print_result(f"Estimated, not measured, on {found.device} with {found.gpus_per_node} GPUs a node:")
    if found.prefill_ns is None:
        print_result(f"  a step {found.step_ns / 1e6:,.1f} ms, {found.tokens_per_s:,.0f} tokens/s")
    else:
        print_result(
            f"  time to first token {found.prefill_ns / 1e6:,.1f} ms, all tokens {found.step_ns / 1e6:,.1f} ms, "
            f"{found.tokens_per_s:,.0f} tokens/s"
        )
    used = f"{found.flops_utilization:.1%}"
    again = f" ({used} with what is computed again)" if used != f"{found.model_flops_utilization:.1%}" else ""
    print_result(
        f"  MFU {found.model_flops_utilization:.1%}{again}; GPUs compute {found.compute_share:.0%} of the time, only "
        f"communicate {found.exposed_communication_share:.0%}, are in the pipeline's bubble {found.bubble_share:.0%} "
        f"and wait for others {max(found.idle_share - found.bubble_share, 0):.0%}"
    )
    for line in (*found.assumptions, *ASSUMED):
        print_result(f"  assumed: {line}")


def _say_routing(result: DryResult) -> str:
    if result.routing is None:
        return "no experts"
    said = dict(result.routing)
    kind = said.pop("kind")
    details = ", ".join(f"{name} {value}" for name, value in said.items())
    return f"routing {kind}" + (f" ({details})" if details else "")


def _name_ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {write_runs(ranks)}"


def _list(ranks: list[int]) -> str:
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {', '.join(map(str, ranks))}"
