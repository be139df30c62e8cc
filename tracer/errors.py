"""What truedag raises when the user's input or run is at fault.

::

    TruedagError
    ├── RecordError      a recording could not be started or stopped
    │   └── BuildError   the native recorder could not be compiled
    ├── TraceError       a trace file is missing, broken or of another version
    │   └── EmptyTraceError  nothing was recorded into it
    ├── MergeError       the traces do not make one true graph
    │   └── CycleError   they depend on each other in a circle
    ├── GraphError       a dataset is missing, broken or of another version
    ├── ReplayError      a graph cannot be executed again: what it lacks, and where
    ├── DrawError        a drawing could not be made
    ├── DrawingError     a drawing cannot be read (`audit.drawing.document`)
    └── ClaimError       a claim cannot be read (`audit.claim`)

Each message says what, where and what to do; `truedag.launch.cli` prints it and nothing else. Anything that is not a
`TruedagError` is a bug in truedag.
"""

from __future__ import annotations


class TruedagError(Exception):
    """The user's input or run is at fault; the message says what to do."""


class RecordError(TruedagError):
    """A recording could not be started or stopped."""


class BuildError(RecordError):
    """The native recorder could not be compiled."""


class TraceError(TruedagError):
    """A trace file is missing, broken or of another version."""


class EmptyTraceError(TraceError):
    """A trace file into which nothing was recorded: its rank ended first."""


class MergeError(TruedagError):
    """The traces do not make one true graph."""


class CycleError(MergeError):
    """Operations depend on each other in a circle: a deadlock in the program or a bug in truedag."""


class GraphError(TruedagError):
    """A dataset is missing, broken or of another version."""


class ReplayError(TruedagError):
    """A graph cannot be executed again from what was recorded."""


class DrawError(TruedagError):
    """A drawing could not be made."""
