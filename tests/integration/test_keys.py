"""What a task has loaded when it has run is what its key names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from memit.requests import write_records
from tasks.engine.cache import FUNCTIONS
from tasks.engine.code import method_modules, task_modules
from tasks.model import describe_model
from tests.families import families
from tests.integration.test_tasks import DOCUMENTS, RECORDS
from tests.unit.tasks.engine.test_code import ROOT

EDITOR = "memit.editors.memit"
"""What edits in the task `edit`, which is keyed on its editor besides."""


def _write_inputs(model: Path, folder: Path) -> None:
    built, tokenizer = families()["gpt2"]()
    built.save_pretrained(model)
    tokenizer.save_pretrained(model)
    described = describe_model("local", "small", None, model)
    (folder / "model.json").write_text(described.model_dump_json())
    records = [replace(r, generation_prompts=(f"{r.request.subject} is",)) for r in RECORDS]
    write_records(records, folder / "records.json")
    (folder / "corpus.txt").write_text("\n".join(DOCUMENTS) + "\n")
    sums = np.eye(described.inner_width, dtype=np.float32)
    np.savez(folder / "published.npz", **{"mom2.mom2": sums, "mom2.count": 9, "sample_size": 9})
    questions = [
        {"subject": f"S{n}", "src": f"Where does S{n} live?", "rephrase": f"The home of S{n}?"}
        | {"answers": ["Rome"], "loc": "where is it", "loc_ans": "here"}
        for n in range(8)
    ]
    (folder / "zsre.json").write_text(json.dumps(questions))


def test_each_task_is_keyed_on_all_that_it_loads(tmp_path: Path) -> None:
    model, folder = tmp_path / "model", tmp_path / "inputs"
    folder.mkdir()
    _write_inputs(model, folder)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.integration.each_task", str(model), str(folder)],
        cwd=ROOT,
        env={**os.environ, "DVC_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    loaded = json.loads(ran.stdout.splitlines()[-1])
    assert loaded.keys() == FUNCTIONS.keys()
    for name, found in loaded.items():
        assert isinstance(found, list), f"{name}: {found}"
        task = FUNCTIONS[name]
        keyed = task_modules(task.__module__, task.__qualname__)
        if name == "edit":
            keyed |= method_modules(EDITOR)
        assert set(found) <= keyed, name
