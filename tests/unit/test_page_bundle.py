"""The page's modules in one script: each after those that it imports, and nothing that the bundler cannot know."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from truedag.tracer.views.page.bundle import bundle


def test_a_module_comes_after_those_that_it_imports() -> None:
    script = bundle(
        {
            "main": 'import { twice as double } from "./sums.js";\n\nconsole.log(double(21));\n',
            "sums": "const FACTOR = 2;\n\nexport function twice(number) {\n  return FACTOR * number;\n}\n",
            "unused": "throw new Error();\n",
        },
        "main",
    )
    assert script.index("module_sums =") < script.index("module_main =")
    assert "const { twice: double } = module_sums;" in script
    assert "unused" not in script
    node = shutil.which("node")
    if node is not None:
        done = subprocess.run([node, "-e", script], capture_output=True, text=True, check=True)
        assert done.stdout == "42\n"


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        ({"main": 'import { a } from "./other.js";\n', "other": 'import { b } from "./main.js";\n'}, "circle"),
        ({"main": 'import { a } from "./nowhere.js";\n'}, "not there"),
        ({"main": 'import "./other.js";\n', "other": ""}, "cannot|not a form"),
        ({"main": "export default 1;\n"}, "not a form"),
        ({"main": 'import { a } from "https://example.org/a.js";\n'}, "not a form"),
    ],
)
def test_what_cannot_be_bundled_is_refused(modules: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        bundle(modules, "main")
