"""The dataset of a run or of a recorded window: merged from its traces, audited and drawn beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truedag.launch.pictures import draw_pictures

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
    """Merge traces into `dag` beside them, write its audit, and draw it into `views`.

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
    from truedag.tracer.merge.merging import Resources, merge_traces

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
    show("auditing")
    audit = audit_run(dag, folder, deployment)
    drawn = draw_pictures(dag, views, show=show)
    return BuiltDataset(
        dag=dag, views=views, pictures=drawn.drawn, not_drawn=drawn.why_not, merge=asdict(merged), audit=audit
    )  # fmt: skip
