"""Train MEND before it edits: a network that turns gradients into updates.

Results: `artifacts/mend/` with the network and the loss of each training step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.command.parameters import Parameters
from flows.requests import split_source
from flows.service.step import Run, step
from flows.statistics import corpus_source
from tasks.engine.artifacts import Artifact
from tasks.engine.cache import CachedTask
from tasks.engine.checkpoints import forget_work
from tasks.engine.results import MEND_NETWORK_FILE
from tasks.mend import Continuations, train_mend_network
from tasks.statistics import collect_corpus


@step("mend", reads=("model",))
def mend(run: Run) -> None:
    """Train the network on records that are not edited, or find the one that was trained."""
    settings = run.parameters.mend_settings(run.model.model.id)
    examples = _training_examples(run.parameters)
    train(run, MEND_NETWORK_FILE, train_mend_network, run.model, examples, settings)


def train(run: Run, path: Path, task: CachedTask, *inputs: Any) -> None:
    """Train what an editor needs, or find what was trained on these inputs."""
    trained = run.compute(task, *inputs)
    forget_work(run.step, *inputs)
    run.copy(trained.file, path)
    run.copy(trained.losses, path.with_name("losses.json"))


def _training_examples(parameters: Parameters) -> Artifact | Continuations:
    section = parameters.mend
    if section.learn_from == "records":
        return split_source(parameters).training
    held_out = parameters.statistics.held_out_documents
    corpus = collect_corpus(corpus_source(parameters), section.texts, section.texts, held_out)
    return Continuations(
        corpus.ranges[0].texts, section.texts, section.continuation_tokens, section.seed
    )
