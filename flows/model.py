"""Step 1: fetch or describe the model that is edited, or train a small one with its own world.

Results: `artifacts/model/model.json` and, of a model made here, its weights and its world.
"""

from flows.service.step import Run, step
from tasks.engine.loaded_model import ModelFiles
from tasks.engine.results import MODEL_FILE, WEIGHTS, WORLD
from tasks.model import describe_model, find_model, train_small_model


@step("model")
def model(run: Run) -> None:
    """Find, fetch or train the model, and write down what it is to the last bit."""
    for folder in (WEIGHTS, WORLD):  # DVC expects them
        folder.mkdir(parents=True, exist_ok=True)
    section = run.parameters.model
    is_made = section.source == "synthetic"
    described = _train(run) if is_made else find_model(**section.identity(), fetched=True)[0]
    run.write_json(MODEL_FILE, described.model_dump())


def _train(run: Run) -> ModelFiles:
    section = run.parameters.model
    made = run.compute(
        train_small_model,
        {"seed": section.seed, **section.world.model_dump()},
        {"seed": section.seed, **section.training.model_dump()},
        section.threads,
    )
    for folder, artifacts in ((WEIGHTS, made.weights), (WORLD, made.world)):
        for name, artifact in artifacts.items():
            run.copy(artifact, folder / name)
    return describe_model("synthetic", "synthetic", None, WEIGHTS).model_copy(
        update={"files": {name: artifact.sha256 for name, artifact in made.weights.items()}}
    )
