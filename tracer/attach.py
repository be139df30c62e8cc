"""Record a program as it is: `python -m truedag.tracer.attach [options] SCRIPT [arguments]`.

Under a launcher of one's own: `torchrun [its options] -m truedag.tracer.attach [options] SCRIPT [arguments]`. The
program runs as Python would run it, with the same results and the same exit code; one line on stderr says what was
recorded. Everything after SCRIPT belongs to it.

Each option can be given in the environment as well: TRUEDAG_OUT, TRUEDAG_STEPS, TRUEDAG_RANKS, TRUEDAG_RECORDER,
TRUEDAG_MAX_BYTES, TRUEDAG_COLLECT.
"""

from __future__ import annotations

import argparse
import builtins
import importlib.machinery
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from truedag.tracer.errors import RecordError
from truedag.tracer.record.attachment import Attachment, attach
from truedag.tracer.record.options import add_record_options, read_options

_PROGRAM = "python -m truedag.tracer.attach"


def main(argv: Sequence[str] | None = None) -> None:
    """Attach to this process and run the program in it; leaves as the program does."""
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_record_options(parser, default_out="truedag-out/SCRIPT")
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is the name of a module, as for python -m")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="the program and its arguments")
    given = parser.parse_args(argv)
    program = given.program[1:] if given.program[:1] == ["--"] else given.program
    if not program:
        parser.error("which program? Name its script, or a module after -m")
    try:
        options = read_options(given, os.environ, default_out=default_out(program[0], is_module=given.module))
    except RecordError as error:
        parser.error(str(error))
    attachment = attach(options)
    sys.argv = list(program)
    main_module, code = _load_module(program[0]) if given.module else _load_script(program[0])
    _run(main_module, code, attachment)


def default_out(program: str, *, is_module: bool) -> Path:
    """Return where the recording of a program goes if nobody says it."""
    return Path("truedag-out") / (program.rpartition(".")[2] if is_module else Path(program).stem)


def _load_script(script: str) -> tuple[ModuleType, CodeType]:
    """Make the `__main__` that Python makes of a script."""
    path = os.path.abspath(script)  # noqa: PTH100
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(script))  # noqa: PTH120
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        sys.stderr.write(f"{_PROGRAM}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}\n")
        sys.exit(2)
    module = _make_main(loader=importlib.machinery.SourceFileLoader("__main__", path), file=path)
    try:
        code: CodeType = compile(source, path, "exec", dont_inherit=True)
    except BaseException:
        _hide_own_frames(module)
        raise
    return module, code


def _load_module(name: str) -> tuple[ModuleType, CodeType]:
    """Make the `__main__` that `python -m` makes of a module or package."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        sys.stderr.write(f"{sys.executable}: Error while finding module specification for {name!r} ({why})\n")
        sys.exit(1)
    code = getattr(spec.loader, "get_code", lambda _: None)(spec.name) if spec is not None else None
    if spec is None or code is None:
        sys.stderr.write(f"{sys.executable}: No module named {name}\n")
        sys.exit(1)
    module = _make_main(loader=spec.loader, file=spec.origin)
    module.__dict__.update(__spec__=spec, __package__=spec.parent, __cached__=spec.cached)
    sys.argv[0] = spec.origin or name
    return module, code


def _make_main(*, loader: Any, file: str | None) -> ModuleType:
    module = ModuleType("__main__")
    module.__dict__.update(
        __file__=file,
        __cached__=None,
        __package__=None,
        __spec__=None,
        __loader__=loader,
        __annotations__={},
        __builtins__=builtins,
    )
    sys.modules["__main__"] = module
    return module


def _run(module: ModuleType, code: CodeType, attachment: Attachment) -> None:
    try:
        exec(code, module.__dict__)  # noqa: S102
    except SystemExit as end:
        attachment.failed = end.code not in (None, 0)
        raise
    except BaseException:
        attachment.failed = True
        _hide_own_frames(module)
        raise


def _hide_own_frames(module: ModuleType) -> None:
    """Have the exception that ends the program shown as Python would: from the program's first frame on."""
    shown = sys.excepthook  # the program may have put another there

    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        while traceback is not None and traceback.tb_frame.f_globals is not module.__dict__:
            traceback = traceback.tb_next
        error.__traceback__ = traceback
        shown(kind, error, traceback)

    sys.excepthook = show


if __name__ == "__main__":
    main()
