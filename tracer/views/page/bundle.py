"""Puts the page's modules into one script: each becomes a function that is called once, after those it imports.

The modules keep to a small part of the language, and what is outside it is refused: named imports from files beside
them, on lines of their own; `export` before a function, a class or a const.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([\w-]+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (async function|function|class|const) (\w+)", re.MULTILINE)
_OTHER = re.compile(r"^(?:import|export)\b.*$", re.MULTILINE)


def bundle(modules: Mapping[str, str], entry: str) -> str:
    """Return one script.

    Args:
        modules: sources by name, without .js.
        entry: the module that starts it all; what it does not need is left out.

    Raises:
        ValueError: modules import each other in a circle, import what is not there, or use other forms.
    """
    done: list[str] = []
    parts: list[str] = []

    def add(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise ValueError(f"modules import each other in a circle: {' -> '.join((*path, name))}")
        if name in done:
            return
        if name not in modules:
            raise ValueError(f"{path[-1] if path else 'the bundle'} imports {name}, which is not there")
        for _, other in _IMPORT.findall(modules[name]):
            add(other, (*path, name))
        done.append(name)
        parts.append(_wrap(name, modules[name]))

    add(entry, ())
    return '"use strict";\n' + "\n".join(parts)


def _wrap(name: str, source: str) -> str:
    exported = [found for _, found in _EXPORT.findall(source)]
    body = _IMPORT.sub(_take, source)
    body = _EXPORT.sub(r"\1 \2", body)
    if other := _OTHER.search(body):
        raise ValueError(f"{name}.js: not a form that can be bundled: {other.group()}")
    return f"const module_{name} = (() => {{\n{body}\nreturn {{ {', '.join(exported)} }};\n}})();"


def _take(found: re.Match[str]) -> str:
    names = ", ".join(part.strip().replace(" as ", ": ") for part in found[1].split(",") if part.strip())
    return f"const {{ {names} }} = module_{found[2]};\n"
