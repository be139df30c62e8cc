"""Prints, as JSON, the groups that megatron-core makes for a rank, and the axes that were said of them.

Arguments: strategies, each with the ranks to ask: TP2-PP2=0,1,2,3
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta

from truedag.parallel.environment import prepare_process

prepare_process()

from torch import distributed  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from truedag.parallel.groups import destroy_groups, init_groups  # noqa: E402
from truedag.parallel.strategy import parse_strategy  # noqa: E402
from truedag.tracer import annotate  # noqa: E402

FIELDS = ("tp", "cp", "pp", "dp", "ep", "expt_tp", "expt_dp", "mp", "embd", "tp_ep", "tp_ep_pp", "dp_cp", "tp_dp_cp")


def ask(notation: str, rank: int) -> dict[str, object]:
    strategy = parse_strategy(notation)
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=strategy.world_size)
    annotate.REGISTRY.axes.clear()
    annotate.REGISTRY.coordinates.clear()
    collection = init_groups(strategy, timedelta(minutes=1))
    answer: dict[str, object] = {"rank": rank, "coordinates": dict(annotate.REGISTRY.coordinates)}
    for field in FIELDS:
        group = getattr(collection, field)
        if group is not None and group is not distributed.GroupMember.NON_GROUP_MEMBER:
            axis = annotate.REGISTRY.axes.get(group.group_name)
            answer[field] = {"ranks": distributed.get_process_group_ranks(group), "axis": axis}
    destroy_groups()
    distributed.destroy_process_group()
    return answer


if __name__ == "__main__":
    questions = (argument.split("=") for argument in sys.argv[1:])
    answers = {notation: [ask(notation, int(rank)) for rank in ranks.split(",")] for notation, ranks in questions}
    json.dump(answers, sys.stdout)
