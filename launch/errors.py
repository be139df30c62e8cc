"""What `truedag` raises when a deployment, a folder or a run is at fault.

::

    TruedagError
    └── LaunchError           what a person asked for cannot be started or did not end well
        ├── UsageError        what was typed is no command
        ├── DeploymentError   a deployment file or an override is wrong
        ├── FolderError       an output folder is in the way or is no run's folder
        └── RunError          the ranks did not all end well
"""

from __future__ import annotations

from truedag.tracer.errors import TruedagError


class LaunchError(TruedagError):
    """What a person asked for cannot be started or did not end well."""


class UsageError(LaunchError):
    """What was typed is no command; the exit code is 2."""


class DeploymentError(LaunchError):
    """A deployment file or an override is wrong; the message names the file or override, and the key."""


class FolderError(LaunchError):
    """An output folder is in the way or is no run's folder."""


class RunError(LaunchError):
    """The ranks did not all end well; the message names the first that failed and what was kept."""
