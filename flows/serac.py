"""Train SERAC before it edits: a scope classifier and a counterfactual model.

Results: `artifacts/serac/` with both models and the losses of both trainings.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from flows.mend import train
from flows.requests import split_source
from flows.service.step import Run, step
from memit.editors.settings import SeracSettings
from memit.model_files import directory_digests
from tasks.engine.hub import resolve_commit
from tasks.engine.results import SERAC_MODELS_FILE
from tasks.serac import train_serac_models


@step("serac", reads=("model",))
def serac(run: Run) -> None:
    """Train both models on records that are not edited, or find those that were trained."""
    settings = _pinned(run.parameters.serac_settings(run.model.model.id))
    records = split_source(run.parameters).training
    train(run, SERAC_MODELS_FILE, train_serac_models, run.model, records, settings)


def _pinned(settings: SeracSettings) -> SeracSettings:
    """The settings with the commits of models from the hub, and the digests of those in
    directories, so that cache keys name them."""
    revisions = {
        f"{part}_revision": _directory_digest(Path(name))
        if Path(name).is_dir()
        else resolve_commit(name, getattr(settings, f"{part}_revision") or "main")
        for part in ("encoder", "counterfactual")
        if (name := getattr(settings, part)) is not None
    }
    return replace(settings, **revisions)


def _directory_digest(directory: Path) -> str:
    files = json.dumps(directory_digests(directory), sort_keys=True)
    return hashlib.sha256(files.encode()).hexdigest()
