"""Make the pictures of docs/ and of the README again, from runs that are there or that it makes.

    python scripts/docs_pictures.py [--train RUN] [--answer RUN] [--estimate RUN] [--large RUN] [--out docs]
                                    [--only NAME ...]

TRAIN is a run of moe-10b-tp2-ep2-pp2-cpu, ANSWER one of llama3-70b-tp2-pp4-cpu, ESTIMATE a dry run of
moe-30b-ep8-tp4-pp2-dp4 with --device h100, LARGE one of moe-30b-ep64-tp8-pp2-dp2; those that are not named and are
needed are made, which takes some minutes. Views are drawn and pages are written anew into a folder of their own; the
runs stay as they are. Bitmaps have at most 400 KB, with a palette where they need one. What is in them, and at which
place, follows the run: look at each, and at what docs/PAGE.md says of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "browser"))
from chromium import Chromium, find_chromium
from page_probe import go

from truedag.tracer.graph import Graph
from truedag.tracer.views.draw import draw
from truedag.tracer.views.page import write_page

RUNS = {
    "train": ("run", "moe-10b-tp2-ep2-pp2-cpu"),
    "answer": ("run", "llama3-70b-tp2-pp4-cpu"),
    "estimate": ("dry", "moe-30b-ep8-tp4-pp2-dp4", "--device", "h100"),
    "large": ("dry", "moe-30b-ep64-tp8-pp2-dp2"),
}
DRAWINGS = {
    "drawing-strategy": "train", "drawing-operators": "answer", "drawing-gpus": "large", "drawing-experts": "large",
}  # fmt: skip
MOST_BYTES = 400_000
NUM_EXACT = 128
LEAST_PIXELS = 20  # of a colour that is to be kept
MARGIN = 20  # pixels around a part of a sheet
OPEN = """(() => {
  const { app, model } = truedag, view = app.views.graph;
  let node = model.numNodes;
  for (const name of %s) {
    node = model.children[node].find((one) => view.nameOf(one) === name);
    if (node === undefined) throw new Error(`no box is called ${name}`);
  }
  if (%s) app.state.open.add(node);
  view.reveal(node);
  app.select({ kind: "node", id: node });
})()"""


def make_run(name: str, folder: Path) -> Path:
    """Run a deployment, or execute it dry."""
    command, deployment, *options = RUNS[name]
    out = folder / deployment
    bare = ["--no-views"] if command == "dry" else []
    program = [sys.executable, "-m", "truedag.launch.cli", command, deployment]
    subprocess.run(
        [*program, *options, *bare, "--out", str(out)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return out


def save(image: Image.Image, path: Path) -> None:
    """Save a picture as it is, or if it has too many bytes then with a palette, and at last smaller."""
    plain = image.convert("RGB")
    plain.save(path, optimize=True)
    share = 1.0
    while path.stat().st_size > MOST_BYTES:
        scaled = plain.resize((round(plain.width * share), round(plain.height * share)), Image.Resampling.LANCZOS)
        reduce_colours(scaled).save(path, optimize=True)
        share *= 0.9
    with Image.open(path) as saved:
        print(f"{path.name}: {saved.width} x {saved.height}, {path.stat().st_size / 1000:,.0f} KB", flush=True)


def reduce_colours(image: Image.Image) -> Image.Image:
    """Keep 256 colours: the most frequent as they are, so that white stays white, and those farthest from all of these.

    Pillow's own ways move colours that are frequent, and lose those of small places, a legend's say.
    """
    pixels = np.asarray(image, np.int32)
    packed = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
    found, at, num = np.unique(packed, return_inverse=True, return_counts=True)
    colours = unpack(found)
    chosen = list(np.argsort(-num, kind="stable")[:NUM_EXACT])
    away = np.full(len(found), np.iinfo(np.int64).max)
    nearest = np.zeros(len(found), np.int64)
    for place in range(256):
        if place >= len(chosen):
            chosen.append(int(np.argmax(np.where(num >= LEAST_PIXELS, away, 0))))
        off = ((colours - colours[chosen[place]]) ** 2).sum(-1)
        nearest[off < away] = place
        away = np.minimum(away, off)
    reduced = Image.fromarray(nearest[at].reshape(packed.shape).astype(np.uint8), "P")
    reduced.putpalette(colours[chosen].astype(np.uint8).tobytes())
    return reduced


def unpack(colours: np.ndarray) -> np.ndarray:
    """Return red, green and blue of colours."""
    return np.stack([colours >> 16, colours >> 8 & 255, colours & 255], -1).astype(np.int64)


def cut_panel(sheet: Path, title: str) -> Image.Image:
    """Return the part of a sheet that a panel of this title fills."""
    import pygraphviz

    graph = pygraphviz.AGraph(filename=str(sheet.with_suffix(".dot")))
    head = next(node for node in graph.nodes() if f". {title}</B>" in node.attr["label"])
    cluster = graph.get_subgraph(f"cluster column {head.split(' ')[1]}")
    image: Image.Image = Image.open(sheet.with_suffix(".png"))
    _, _, width, height = (float(part) for part in graph.graph_attr["bb"].split(","))
    left, low, right, high = (float(part) for part in cluster.graph_attr["bb"].split(","))
    scale, pad = 96 / 72, (image.width - width * 96 / 72) / 2
    box = (left * scale + pad, (height - high) * scale + pad, right * scale + pad, (height - low) * scale + pad)
    grown = (box[0] - MARGIN, box[1] - MARGIN, box[2] + MARGIN, box[3] + MARGIN)
    low_x, low_y = max(0, int(grown[0])), max(0, int(grown[1]))
    return image.crop((low_x, low_y, min(image.width, int(grown[2])), min(image.height, int(grown[3]))))


def draw_all(runs: Mapping[str, Path], folder: Path, wanted: Callable[[str], bool], out: Path) -> None:
    """Make the pictures of drawings."""
    if wanted("drawing-strategy"):
        (one,) = draw(runs["train"] / "dag", folder / "train", views=["simplified"])
        save(Image.open(one.png), out / "drawing-strategy.png")
    if wanted("drawing-operators"):
        (one,) = draw(runs["answer"] / "dag", folder / "answer", views=["detailed"])
        sheet = next(path for path in one.sheets if ".decode" in path.name and "stage-1.layers" in path.name)
        save(Image.open(sheet.with_suffix(".png")), out / "drawing-operators.png")
    if wanted("drawing-gpus") or wanted("drawing-experts"):
        views = draw(runs["large"] / "dag", folder / "large", views=["comprehensive", "detailed"])
        if wanted("drawing-gpus"):
            save(Image.open(views[0].png), out / "drawing-gpus.png")
        if wanted("drawing-experts"):
            sheet = next(path for path in views[1].sheets if path.name == "stage-0.layers-0-7.forward.svg")
            save(cut_panel(sheet, "experts"), out / "drawing-experts.png")


def photograph(runs: Mapping[str, Path], folder: Path, wanted: Callable[[str], bool], out: Path) -> None:
    """Make the pictures of pages."""
    for run in runs:
        mine = [(name, act) for name, (of, act) in SCENES.items() if of == run and wanted(name)]
        if not mine:
            continue
        program = find_chromium()
        if program is None:
            sys.exit("no Chromium: install one, or name it with CHROMIUM")
        graph = Graph.open(runs[run])
        audit = runs[run] / "audit.json"
        told = json.loads(audit.read_text(encoding="utf-8")) if audit.exists() else None
        page = write_page(graph, folder / f"page-{run}", audit=told)
        with Chromium(program) as browser:
            for name, act in mine:
                browser.open(page.html.as_uri())
                act(browser, graph)
                browser.settle()
                raw = folder / f"{name}.png"
                browser.picture(raw)
                assert browser.errors == [], browser.errors
                save(Image.open(raw), out / f"{name}.png")


def follow(link: str) -> Callable[[Chromium, Graph], None]:
    """Return what follows a link."""
    return lambda browser, _: go(browser, link)


def open_boxes(*names: str, is_open: bool) -> Callable[[Chromium, Graph], None]:
    """Return what opens boxes from the forward pass of the first stage on.

    The last one is chosen, or opened too, and in sight.
    """

    def act(browser: Chromium, _: Graph) -> None:
        go(browser, "#view=graph")
        browser.evaluate(OPEN % (json.dumps(["forward · stage 0", *names]), json.dumps(is_open)))

    return act


def show_all_to_all(browser: Chromium, graph: Graph) -> None:
    """Choose the all-to-all that one of its ranks waited in the longest, and show what ran around it."""
    own = (pl.col("kind") == "collective") & (pl.col("label") == "all-to-all ep")
    met = graph.participants.join(graph.nodes.filter(own).select("node"), on="node")
    waited = met.select("node", "rank", waited=pl.col("start_ns") - pl.col("arrive_ns")).sort("waited", "node", "rank")
    node, rank = waited.select("node", "rank").last().collect().row(0)
    slices = "truedag.model.slices"
    piece = browser.evaluate(f"{slices}.ofNode({node}).find((one) => {slices}.rank[one] === {rank})")
    go(browser, f"#view=time&lanes=1&select=slice.{piece}")
    begin, end = browser.evaluate("truedag.app.marks.window")
    middle, half = (begin + end) / 2, 1.5 * (end - begin)
    go(browser, f"#view=time&lanes=1&select=slice.{piece}&window={middle - half:.0f}_{middle + half:.0f}")


def show_straggler(browser: Chromium, _: Graph) -> None:
    """Go from the straggler that was waited for most to its time, on the ranks of its group."""
    go(browser, "#view=path&theme=dark")
    browser.evaluate("truedag.app.goTo({ kind: 'straggler', id: 0 }, 'time')")


def show_path(browser: Chromium, _: Graph) -> None:
    """Choose the third of the stragglers."""
    go(browser, "#view=path")
    browser.evaluate("document.querySelectorAll('tr[data-straggler]')[2].click()")


# By picture: of which run, and what is done on its page.
SCENES: dict[str, tuple[str, Callable[[Chromium, Graph], None]]] = {
    "page-overview": ("train", follow("#view=overview&select=rank.5")),
    "page-graph": ("train", open_boxes("layer 1", "mlp", is_open=True)),
    "page-time": ("train", follow("#view=time")),
    "page-timeline": ("train", show_all_to_all),
    "page-communication": ("train", follow("#view=traffic&select=rank.5")),
    "page-critical-path": ("train", show_path),
    "page-256-estimate": ("estimate", follow("#view=overview&theme=dark")),
    "page-256-timeline": ("estimate", show_straggler),
    "page-256-critical-path": ("estimate", follow("#view=path&theme=dark")),
    "page-2048-ranks": ("large", follow("#view=overview&metric=bytes&select=rank.70")),
    "page-2048-experts": ("large", open_boxes("layer 1", "mlp", "experts", "expert 3", is_open=False)),
    "page-2048-order": ("large", follow("#view=time")),
    "page-2048-communication": ("large", follow("#view=traffic")),
}


def main() -> None:
    """Make them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, words in RUNS.items():
        parser.add_argument(f"--{name}", type=Path, help=f"what truedag {' '.join(words)} made")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    parser.add_argument("--only", nargs="+", default=[], help="names of pictures, or how they begin")
    arguments = parser.parse_args()

    def wanted(name: str) -> bool:
        return not arguments.only or any(name.startswith(one) for one in arguments.only)

    with tempfile.TemporaryDirectory(prefix="truedag-docs-") as scratch:
        folder = Path(scratch)
        pictures = DRAWINGS | {name: run for name, (run, _) in SCENES.items()}
        needed = {run for name, run in pictures.items() if wanted(name)}
        runs = {name: getattr(arguments, name) or make_run(name, folder) for name in RUNS if name in needed}
        draw_all(runs, folder, wanted, arguments.out)
        photograph(runs, folder, wanted, arguments.out)


if __name__ == "__main__":
    main()
