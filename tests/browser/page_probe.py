"""What the tests ask of a page that is open in Chromium."""

from __future__ import annotations

from typing import Any

from chromium import Chromium

VIEWS = ("overview", "graph", "time", "traffic", "path", "findings")


def number_of_colours(browser: Chromium, selector: str) -> int:
    """How many different colours a canvas shows; 1 is an empty one."""
    script = """(() => {
      const canvas = document.querySelector(%r);
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return new Set(new Uint32Array(data.buffer)).size;
    })()"""
    return int(browser.evaluate(script % selector))


def facts(browser: Chromium) -> dict[str, str]:
    """What the panel at the side says: names and values."""
    script = """Object.fromEntries([...document.querySelectorAll("#detail dl dt")].map(
      (name) => [name.textContent.trim(), name.nextElementSibling.textContent]))"""
    found: dict[str, str] = browser.evaluate(script)
    return found


def go(browser: Chromium, link: str) -> None:
    """Follow a link inside the page."""
    browser.evaluate(f"location.hash = {link!r}")
    browser.settle()


def state(browser: Chromium) -> dict[str, Any]:
    """What is on screen, as the page keeps it."""
    script = "(() => { const { open, ...rest } = truedag.app.state; return { ...rest, open: [...open] }; })()"
    found: dict[str, Any] = browser.evaluate(script)
    return found


def box_of(browser: Chromium, name: str) -> tuple[float, float]:
    """Where on screen the first box of a name is drawn."""
    script = f"""(() => {{
      const view = truedag.app.views.graph;
      const box = view.layout.boxes.find((one) => view.nameOf(one.node) === {name!r});
      const spot = view.spot(box.node);
      const place = view.board.canvas.getBoundingClientRect();
      return [place.left + spot.x + box.width * spot.scale / 2, place.top + spot.y + 14 * spot.scale];
    }})()"""
    x, y = browser.evaluate(script)
    return float(x), float(y)
