"""What SERAC learns before it edits: a scope classifier and a counterfactual model.

Results: ``artifacts/serac/`` with both models and the losses of both trainings.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flows.command.parameters import Parameters, overridden
from flows.command.script import given_parameters, run_flow

if __name__ == "__main__":
    given_parameters()

from prefect import flow

from flows.methods import learn, split
from flows.service.gpu_slot import taking_turns
from tasks.engine.loaded_model import directory_digests
from tasks.engine.results import upstream
from tasks.model import open_model, resolve_commit
from tasks.serac import train_serac_models

if TYPE_CHECKING:
    from memit.editors.serac import SeracSettings


@flow(name="serac", validate_parameters=False)
@taking_turns
def serac(parameters: Parameters) -> None:
    """Train both models on records that are not edited, or find those that were."""
    from memit.editors.serac import serac_preset

    given = upstream("model")
    model = open_model(**parameters.model.placement())
    settings = _pinned(overridden(serac_preset(model.model.id), parameters.serac))
    learn("serac", given, train_serac_models, model, split(parameters).training, settings)


def _pinned(settings: SeracSettings) -> SeracSettings:
    """The settings with the commits of models from the hub, and the digests of those in
    directories, so that what was learnt names them."""
    commits = {
        f"{part}_revision": _directory_digest(Path(name))
        if Path(name).is_dir()
        else resolve_commit(name, getattr(settings, f"{part}_revision") or "main")
        for part in ("encoder", "counterfactual")
        if (name := getattr(settings, part)) is not None
    }
    return replace(settings, **commits)


def _directory_digest(directory: Path) -> str:
    files = json.dumps(directory_digests(directory), sort_keys=True)
    return hashlib.sha256(files.encode()).hexdigest()


if __name__ == "__main__":
    run_flow(serac)
