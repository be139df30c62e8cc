"""The dataset of a run or of a recorded window: merged from its traces, drawn and audited beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from truedag.launch.deployment import Deployment


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltDataset:
    """What was made of traces."""

    dag: Path
    views: Path
    pictures: list[Path]
    not_drawn: str
    """Why there are none; empty where there are."""

    merge: Mapping[str, Any]
    audit: Mapping[str, Any]
    """verdict, num_faults and the file that says more."""


def build_dataset(
    traces: Path, *, name: str, deployment: Deployment | None, show: Callable[[str], None]
) -> BuiltDataset:
    """Merge traces into `dag` beside them, draw it into `views`, and write its audit.

    Args:
        traces: the folder of one trace per rank.
        name: of what was recorded, where no deployment says it.
        deployment: what the audit compares the dataset with; None: with nothing.
        show: hears what goes on.

    Raises:
        TruedagError: the traces could not be merged.
        LaunchError: the audit cannot be written.
    """
    from truedag.launch.run_audit import audit_run
    from truedag.tracer.errors import DrawError
    from truedag.tracer.merge.merging import Resources, merge_traces
    from truedag.tracer.views.draw import draw

    folder = traces.parent
    dag, views = folder / "dag", folder / "views"
    show("merging the traces")
    merged = merge_traces(
        traces,
        dag,
        deployment=name if deployment is None else deployment.name,
        strategy=None if deployment is None else deployment.strategy.describe(),
        progress=show,
        resources=Resources.of_machine(),
    )
    show("drawing")
    try:
        pictures, not_drawn = [one.svg for one in draw(dag, views, progress=show)], ""
    except DrawError as error:  # the graph is there all the same
        pictures, not_drawn = [], str(error)
    show("auditing")
    audit = audit_run(dag, folder, deployment)
    return BuiltDataset(
        dag=dag, views=views, pictures=pictures, not_drawn=not_drawn, merge=asdict(merged), audit=audit
    )  # fmt: skip
