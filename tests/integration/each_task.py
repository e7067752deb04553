"""Runs every cached task in a process of its own, and prints what of the method each has loaded.

    python -m tests.integration.each_task MODEL FOLDER

MODEL is a small model's directory; FOLDER holds what `test_keys.py` writes there. The processes are
forked from one that has only imported libraries. What one task leaves is an input of later ones.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

LIBRARIES = ("prefect", "pyarrow.parquet", "pydantic", "rich.progress", "transformers")
PREFIXES = ("The town is. ",)
BUDGET = 256
MODEL, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])


def file(name: str) -> Any:
    """A file of the folder, or what an earlier task left."""
    from tasks.engine.artifacts import Artifact, describe

    kept = FOLDER / f"{name}.artifact"
    if kept.exists():
        return Artifact.model_validate_json(kept.read_text())
    return describe(FOLDER / name)


def keep(name: str, artifact: Any) -> None:
    (FOLDER / f"{name}.artifact").write_text(artifact.model_dump_json())


def reference() -> Any:
    from tasks.engine.loaded_model import ModelFiles, ModelReference

    described = ModelFiles.model_validate_json((FOLDER / "model.json").read_text())
    return ModelReference(
        directory=str(MODEL), model=described, dtype="float32", device="cpu", threads=1
    )


def model() -> None:
    from tasks.model import train_small_model

    world = {"people": 8, "relations": 2, "objects": 2, "biographies": 4}
    shape = {"layers": 1, "width": 16, "heads": 2, "vocabulary": 400, "steps": 2}
    train_small_model.fn(world, {**shape, "warmup_steps": 1}, 1)


def recall() -> None:
    from tasks.model import measure_recall

    measure_recall.fn(reference(), file("records.json"), BUDGET)


def requests() -> None:
    from tasks.requests import choose_requests

    choose_requests.fn("counterfact", file("records.json"), 6, 0, reference())


def prefixes() -> None:
    from tasks.prefixes import draw_prefixes

    draw_prefixes.fn(reference(), 0)


def corpus() -> None:
    from tasks.statistics import CorpusSource, collect_corpus

    made = collect_corpus.fn(CorpusSource(file=file("corpus.txt")), 18, 18, 2)
    keep("texts", made.ranges[0].texts)
    (FOLDER / "corpus.json").write_text(made.model_dump_json())


def statistics() -> None:
    from tasks.statistics import collect_shard

    made = collect_shard.fn(file("texts"), reference(), (1, 2), BUDGET)
    for layer, moment in made.moments.items():
        keep(f"layer-{layer}", moment)


def import_() -> None:
    from tasks.statistics import import_moment

    width = reference().model.inner_width
    import_moment.fn(file("published.npz"), {"layer": 1}, width)


def hyperparameters(layers: tuple[int, ...]) -> Any:
    from memit.hyperparameters import Hyperparameters

    return Hyperparameters(layers, 5.0, evaluations=3)


def chosen() -> list[Any]:
    from memit.requests import read_counterfact

    return read_counterfact(FOLDER / "records.json")


def targets() -> None:
    from tasks.targets import optimise_targets

    asked = [record.request for record in chosen()]
    made = optimise_targets.fn(asked, reference(), PREFIXES, hyperparameters((2,)), BUDGET)
    keep("targets", made.targets)


def edit() -> None:
    from memit.editors.memit import Memit
    from tasks.edit import Method, edit_with

    made = edit_with.fn(
        Method("memit", Memit(hyperparameters((1, 2)))),
        reference(),
        file("records.json"),
        prefixes=PREFIXES,
        moments={layer: file(f"layer-{layer}") for layer in (1, 2)},
        targets=file("targets"),
        token_budget=BUDGET,
        on_failure="stop",
    )
    keep("delta", made.edit)


def changed_weights() -> None:
    from tasks.edit import changed_weights

    changed_weights.fn(reference(), file("delta"))


def evaluation() -> None:
    from memit.evaluation.counterfact import prompts_of
    from tasks.evaluation import score_piece

    score_piece.fn(prompts_of(chosen()), reference(), file("delta"), BUDGET)


def perplexity() -> None:
    from tasks.evaluation import measure_perplexity

    measure_perplexity.fn(file("texts"), reference(), file("delta"), BUDGET)


def generation() -> None:
    from tasks.evaluation import write_piece

    write_piece.fn(chosen(), reference(), file("delta"), 0, BUDGET)


def references() -> None:
    from tasks.evaluation import collect_references
    from tasks.statistics import Corpus

    made = Corpus.model_validate_json((FOLDER / "corpus.json").read_text())
    collect_references.fn("counterfact", file("records.json"), made)


def split() -> None:
    from tasks.requests import split_records

    keep("training", split_records.fn("zsre", file("zsre.json"), 4, 0).training)


def questions() -> None:
    from tasks.requests import sample_questions

    sample_questions.fn(file("records.json"), 2, 0)


def select_targets() -> None:
    from tasks.targets import select_targets

    select_targets.fn([file("targets")], [1, 0])


def zsre() -> None:
    from memit.evaluation.zsre import read_zsre
    from tasks.evaluation import answer_piece

    answer_piece.fn(read_zsre(FOLDER / "zsre.json"), reference(), file("delta"), BUDGET)


def mend() -> None:
    from memit.editors.mend import MendSettings
    from tasks.mend import Continuations, train_mend_network

    settings = MendSettings(blocks=1, rank=2, edits_at_once=2, steps=1)
    train_mend_network.fn(reference(), Continuations(file("texts"), 8, 2, 0), settings)


def serac() -> None:
    from memit.editors.serac import SeracSettings
    from tasks.serac import train_serac_models

    settings = SeracSettings(
        encoder=None,
        counterfactual=None,
        width=8,
        layers=1,
        classifier_steps=1,
        counterfactual_steps=1,
        batch_size=2,
    )
    train_serac_models.fn(reference(), file("records.json"), settings)


IN_ORDER = (
    *(
        model,
        recall,
        requests,
        prefixes,
        corpus,
        statistics,
        import_,
        targets,
        edit,
        changed_weights,
    ),
    *(evaluation, perplexity, generation, references, split, questions),
    *(select_targets, zsre, mend, serac),
)
"""A function for each task, with its name."""


def loaded_by(run: Any) -> list[str] | str:
    """What a task has loaded, or why it failed, told through a pipe by a process of its own."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            run()
            told: Any = sorted(name for name in sys.modules if name.partition(".")[0] == "memit")
        except BaseException:
            told = traceback.format_exc()
        os.write(writer, json.dumps(told).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        return json.loads(pipe.read())


if __name__ == "__main__":
    for library in LIBRARIES:
        import_module(library)
    assert not any(name.partition(".")[0] in ("memit", "tasks") for name in sys.modules)
    print(json.dumps({run.__name__.rstrip("_"): loaded_by(run) for run in IN_ORDER}))
