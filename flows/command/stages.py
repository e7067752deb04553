"""Write the code that DVC's stages depend on into their files (``make stages``).

A stage depends on the modules behind its flow, see `tasks.engine.code`, on the folders that these
read, and on the pinned libraries. The rest of its dependencies is written by hand.
"""

import io
from pathlib import Path

from ruamel.yaml import YAML

from tasks.engine.code import ROOT, modules_behind, source_files

FILES = tuple(map(Path, ("dvc.yaml", "methods/stages.yaml")))
LIBRARIES = "constraints.txt"
DATA = {"memit.hyperparameters": "memit/presets", "memit.facts.records": "memit/facts/relations"}
"""Folders that a module reads."""
WITHOUT_LIBRARIES = ("report",)
"""Stages that compute nothing."""


def with_code(text: str) -> str:
    """A file of stages with the code dependencies that they have now."""
    form = YAML()
    form.indent(mapping=2, sequence=4, offset=2)
    form.width = 1_000
    tree = form.load(text)
    for name, stage in tree["stages"].items():
        by_hand = [
            dep
            for dep in stage["deps"]
            if not dep.endswith((".py", ".toml", LIBRARIES)) and dep not in DATA.values()
        ]
        libraries = [] if name in WITHOUT_LIBRARIES else [LIBRARIES]
        stage["deps"] = list(dict.fromkeys([*_code(name), *libraries, *by_hand]))
    out = io.StringIO()
    form.dump(tree, out)
    return out.getvalue()


def _code(stage: str) -> list[str]:
    modules = modules_behind(f"flows.{stage}")
    paths = [path for module in modules for path in source_files(module)]
    files = sorted(str(path.relative_to(ROOT)) for path in paths)
    return files + [folder for module, folder in DATA.items() if module in modules]


if __name__ == "__main__":
    for path in FILES:
        path.write_text(with_code(path.read_text(encoding="utf-8")), encoding="utf-8")
