"""What MEND learns before it edits: a network that turns gradients into updates.

Results: ``artifacts/mend/`` with the network and the loss of each training step.
"""

from __future__ import annotations

from flows.command.parameters import Parameters, overridden
from flows.command.script import given_parameters, run_flow

if __name__ == "__main__":
    given_parameters()

from prefect import flow

from flows.methods import learn, split
from flows.service.gpu_slot import taking_turns
from flows.statistics import corpus_source
from tasks.corpus import collect_corpus
from tasks.engine.artifacts import Artifact
from tasks.engine.results import upstream
from tasks.mend import Continuations, train_mend_network
from tasks.model import open_model


@flow(name="mend", validate_parameters=False)
@taking_turns
def mend(parameters: Parameters) -> None:
    """Train the network on records that are not edited, or find the one that was."""
    from memit.editors.mend import mend_preset

    given = upstream("model")
    model = open_model(**parameters.model.placement())
    settings = overridden(mend_preset(model.model.id), parameters.mend)
    learn("mend", given, train_mend_network, model, _learnt_from(parameters), settings)


def _learnt_from(parameters: Parameters) -> Artifact | Continuations:
    section = parameters.mend
    if section.learn_from == "records":
        return split(parameters).training
    statistics = parameters.statistics
    corpus = collect_corpus(
        corpus_source(parameters), section.texts, section.texts, statistics.held_out_documents
    )
    return Continuations(
        corpus.ranges[0].texts, section.texts, section.continuation_tokens, section.seed
    )


if __name__ == "__main__":
    run_flow(mend)
