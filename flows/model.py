"""Step 1: which model is edited. Fetch it, describe it, or make a small one with its own world.

Results: ``artifacts/model/model.json`` and, of a model made here, its weights and its world.
"""

from __future__ import annotations

from pathlib import Path

from flows.command.parameters import ModelSection, Parameters
from flows.command.script import given_parameters, run_flow

if __name__ == "__main__":
    given_parameters()  # a slip in params.yaml is told before anything slow is imported

from prefect import flow

from flows.service.gpu_slot import taking_turns
from tasks.engine.artifacts import copy_file, describe, write_json
from tasks.engine.checkpoints import forget_work
from tasks.engine.cost import Cost
from tasks.engine.loaded_model import ModelFiles, ModelReference
from tasks.engine.results import MODEL_FILE, WEIGHTS, WORLD, finish_step
from tasks.model import (
    check_weights,
    describe_model,
    fetch_model,
    measure_recall,
    resolve_commit,
    train_small_model,
)

RECALL_TOKEN_BUDGET = 4_096
"""Tokens in a batch while the facts of a model made here are asked for."""


@flow(name="model", validate_parameters=False)
@taking_turns
def model(parameters: Parameters) -> None:
    """Find, fetch or make the model, and write down what it is to the last bit."""
    section = parameters.model
    if section.source == "synthetic":
        described, files, costs = _make_small_model(parameters)
    else:
        described, files, costs = _describe(section), [], []
    for folder in (WEIGHTS, WORLD):  # DVC expects them
        folder.mkdir(parents=True, exist_ok=True)
    write_json(MODEL_FILE, described.model_dump())
    finish_step("model", [MODEL_FILE, *files], {}, costs)


def _make_small_model(parameters: Parameters) -> tuple[ModelFiles, list[Path], list[Cost]]:
    section = parameters.model
    given = (
        {"seed": section.seed, **section.world.model_dump()},
        {"seed": section.seed, **section.training.model_dump()},
        section.threads,
    )
    made = train_small_model(*given)
    forget_work("model", *given)
    files: list[Path] = []
    for folder, artifacts in ((WEIGHTS, made.weights), (WORLD, made.world)):
        for name, artifact in artifacts.items():
            copy_file(artifact.checked(), folder / name)
            files.append(folder / name)
    described = describe_model("synthetic", "synthetic", None, WEIGHTS).model_copy(
        update={"files": {name: artifact.sha256 for name, artifact in made.weights.items()}}
    )
    reference = ModelReference(
        directory=str(WEIGHTS.resolve()),
        model=described,
        dtype="float32",
        device="cpu",
        threads=section.threads,
    )
    recall = measure_recall(
        reference, describe(WORLD / "records.json"), token_budget=RECALL_TOKEN_BUDGET
    )
    described = described.model_copy(update={"recall": recall.percent})
    return described, files, [made.cost, recall.cost]


def _describe(section: ModelSection) -> ModelFiles:
    if section.source == "hub":
        name = str(section.id)
        commit = resolve_commit(name, str(section.revision))
        return describe_model("hub", name, commit, fetch_model(name, commit))
    directory = Path(str(section.path))
    check_weights(directory)
    return describe_model("local", directory.resolve().name, None, directory)


if __name__ == "__main__":
    run_flow(model)
