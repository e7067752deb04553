"""The task that trains SERAC before it edits: a scope classifier and a counterfactual model."""

from dataclasses import replace
from pathlib import Path

from memit.editors.serac import SeracSettings, train_serac
from memit.files.digests import content_digest
from memit.model_files import directory_digests
from memit.requests import read_counterfact
from tasks.engine.artifacts import Artifact
from tasks.engine.cache import cached_task
from tasks.engine.checkpoints import work_directory
from tasks.engine.hub import resolve_commit
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.progress import progress_bar
from tasks.mend import Trained, finished


def pinned(settings: SeracSettings) -> SeracSettings:
    """The settings with the commits of models from the hub, and the digests of those in
    directories, so that cache keys name them."""
    revisions = {
        f"{part}_revision": content_digest(directory_digests(Path(name)))
        if Path(name).is_dir()
        else resolve_commit(name, getattr(settings, f"{part}_revision") or "main")
        for part in ("encoder", "counterfactual")
        if (name := getattr(settings, part)) is not None
    }
    return replace(settings, **revisions)


@cached_task("serac")
def train_serac_models(
    model: ModelReference, records: Artifact, settings: SeracSettings
) -> Trained:
    """Train both models on records, going on from the last checkpoint."""
    steps = settings.classifier_steps + settings.counterfactual_steps
    with loaded(model) as lm, progress_bar("serac", steps, "training steps") as bar:
        models, losses = train_serac(
            lm,
            read_counterfact(records.checked()),
            settings,
            directory=work_directory(),
            progress=bar.advance,
        )
    return finished("serac", models.save, losses)
