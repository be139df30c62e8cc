"""The drawings' font: carried by a package, so that a machine without fonts draws letters and not empty boxes."""

from __future__ import annotations

from base64 import b64encode
from importlib.resources import files
from pathlib import Path
from xml.sax.saxutils import escape

from truedag.tracer.errors import DrawError

FAMILY = "IBM Plex Sans Condensed"
_PACKAGE = "fontpkg_ibm_plex_sans_condensed"
_REGULAR, _BOLD = "IBMPlexSansCondensed-Regular.ttf", "IBMPlexSansCondensed-Bold.ttf"


def write_fontconfig(folder: Path) -> Path:
    """Write a fontconfig file that knows the carried family alone, so that every machine draws alike.

    Its cache lies in the same folder, which may be deleted afterwards.

    Raises:
        DrawError: the font is not installed.
    """
    path = folder / "fonts.conf"
    path.write_text(
        '<?xml version="1.0"?>\n<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">\n<fontconfig>\n'
        f"  <dir>{escape(str(_folder()))}</dir>\n"
        f"  <cachedir>{escape(str(folder / 'cache'))}</cachedir>\n"
        "</fontconfig>\n",
        encoding="utf-8",
    )
    return path


def embed_font(svg: bytes) -> bytes:
    """Put the family into an SVG, so that it looks alike where it is not installed."""
    styles = [
        f"@font-face{{font-family:'{FAMILY}';font-weight:{weight};"
        f"src:url(data:font/ttf;base64,{b64encode((_folder() / name).read_bytes()).decode()})}}"
        for weight, name in (("normal", _REGULAR), ("bold", _BOLD))
    ]
    head, begin, body = svg.partition(b"<g id=")
    return head + f"<style>{''.join(styles)}</style>\n".encode() + begin + body


def font_file(*, bold: bool) -> Path:
    """Return where the regular or the bold style lies.

    Raises:
        DrawError: the font is not installed.
    """
    return _folder() / (_BOLD if bold else _REGULAR)


def _folder() -> Path:
    try:
        return Path(str(files(_PACKAGE))) / "files"
    except ModuleNotFoundError as error:
        raise DrawError(f"the drawings' font is not installed ({_PACKAGE}): install truedag again") from error
