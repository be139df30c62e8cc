"""`python -m truedag.tracer.record.native`: build the native recorder and print where it lies."""

from __future__ import annotations

import sys

from truedag.tracer.errors import TruedagError
from truedag.tracer.record.native.build import build_recorder

if __name__ == "__main__":
    try:
        sys.stdout.write(f"{build_recorder()}\n")
    except TruedagError as error:
        sys.exit(f"truedag: {error}")
