"""The task of the step `serac`: train the scope classifier and the counterfactual model."""

from __future__ import annotations

from memit.editors.serac import SeracSettings, train_serac
from memit.requests import read_counterfact
from tasks.engine.artifacts import Artifact
from tasks.engine.cache import cached_task
from tasks.engine.checkpoints import work_directory
from tasks.engine.loaded_model import ModelReference, loaded
from tasks.engine.progress import progress_bar
from tasks.mend import Trained, finished


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
            directory=work_directory("serac", model, records, settings),
            progress=bar.advance,
        )
    return finished("serac", models.save, losses)
