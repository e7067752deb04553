"""SERAC: a memory of edits, a classifier of what they cover, a small model that answers there.

Mitchell et al. (2022). The edited model's weights do not change: the memory stands in front of it
as its router (`memit.language_model.Router`). A prompt that the classifier finds in the scope of an
edit is answered by the counterfactual model, which reads the edit and then the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from memit.editors.base import Editor, Resources, provenance, register
from memit.editors.packed_models import pack, unpack
from memit.editors.scope_classifier import ScopeClassifier, load_encoder, new_encoder
from memit.editors.settings import SeracSettings
from memit.editors.teacher_forcing import mean_nll
from memit.editors.training_set import check_unseen, fact_key
from memit.errors import InputError
from memit.files.digests import content_digest, file_sha256
from memit.files.reading import holding
from memit.files.tensors import load_tensors, save_tensors
from memit.language_model import LanguageModel, load_model
from memit.positions import continuation_rows
from memit.requests import EditRequest, Record
from memit.training import Training, run_training, warmup

TOKEN_BUDGET = 4_096
"""Padded tokens that the classifier encodes at a time."""


@dataclass(frozen=True)
class SeracModels:
    """What is trained, once for all edits."""

    classifier: ScopeClassifier
    counterfactual: LanguageModel
    origin: Mapping[str, Any]
    """Settings, training facts, and the model whose tokens the small ones share."""

    def to(self, device: torch.device) -> SeracModels:
        """The same models on a device."""
        self.classifier.to(device)
        self.counterfactual.model.to(device)  # type: ignore[arg-type]
        return self

    def packed(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of both models."""
        classifier, lm = self.classifier, self.counterfactual
        tensors, metadata = pack("encoder", classifier.encoder, classifier.tokenizer)
        more, described = pack("counterfactual", lm.model, lm.tokenizer)
        own = {"log_scale": classifier.log_scale, "bias": classifier.bias}
        origin = json.dumps(self.origin, sort_keys=True)
        return {**tensors, **more, **own}, {**metadata, **described, "origin": origin}

    def save(self, path: Path) -> None:
        """Write both models into one safetensors file."""
        tensors, metadata = self.packed()
        save_tensors(tensors, path, metadata)

    @staticmethod
    def load(path: Path) -> SeracModels:
        """Read what `save` wrote; raises `IntegrityError` for anything else."""
        return _unpacked(path)[0]


def _unpacked(path: Path) -> tuple[SeracModels, dict[str, Tensor], dict[str, str]]:
    """The models in a file, and all of its tensors and metadata."""
    tensors, metadata = load_tensors(path)
    with holding(path, "the models of SERAC", "train or fetch them again"):
        classifier = ScopeClassifier(*unpack("encoder", AutoModel, tensors, metadata))
        with torch.no_grad():
            classifier.log_scale.copy_(tensors["log_scale"])
            classifier.bias.copy_(tensors["bias"])
        model, tokenizer = unpack("counterfactual", AutoModelForCausalLM, tensors, metadata)
        lm = LanguageModel(model, tokenizer, name="counterfactual model")
        models = SeracModels(classifier.requires_grad_(False), lm, json.loads(metadata["origin"]))
        return models, tensors, metadata


def statement(request: EditRequest) -> str:
    """An edit as the memory keeps it and as the counterfactual model reads it."""
    return f"{request.text}{request.ending()}."


# --- training ------------------------------------------------------------------------------------


def train_serac(
    lm: LanguageModel,
    records: Sequence[Record],
    settings: SeracSettings,
    *,
    directory: Path | None,
    progress: Callable[[int], None] | None = None,
) -> tuple[SeracModels, dict[str, list[float]]]:
    """Train classifier and counterfactual model on records that are not the evaluated ones.

    Of the edited model only the tokenizer is used, by models that are made here. `directory` keeps
    checkpoints, from which an interrupted training resumes. Gives the models and the losses of both
    trainings.

    Raises:
        InputError: there are too few records.
        UnreachableError: a model cannot be loaded.
        NumericsError: a training diverges.
    """
    if len(records) < settings.batch_size:
        raise InputError(
            f"SERAC has {len(records)} records to learn from and needs {settings.batch_size}: edit "
            "fewer, so that more are left, or make its batches smaller."
        )
    origin = {
        "settings": asdict(settings),
        "tokens_of": lm.name,
        "records": content_digest([asdict(record) for record in records]),
        "trained_on": sorted({fact_key(record.request) for record in records}),
    }
    name = content_digest(origin)[:16]
    models = SeracModels(_new_classifier(lm, settings), _new_counterfactual(lm, settings), origin)
    models.to(lm.device)

    def fit(
        part: str, module: nn.Module, steps: int, loss_at: Callable[[int], Tensor]
    ) -> list[float]:
        schedule, largest = warmup(settings.warmup_steps), settings.largest_gradient
        training = Training(
            f"serac-{part}-{name}", steps, directory, largest, schedule, progress=progress
        )
        module.train().requires_grad_()
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=settings.learning_rate, weight_decay=0.0
        )
        losses = run_training(training, module, optimizer, loss_at)
        module.eval().requires_grad_(False)
        return losses

    scope, answer = (loss_of(models, records, settings) for loss_of in (_scope_loss, _answer_loss))
    small = models.counterfactual.model
    return models, {
        "classifier": fit("classifier", models.classifier, settings.classifier_steps, scope),
        "counterfactual": fit("counterfactual", small, settings.counterfactual_steps, answer),
    }


def _new_classifier(lm: LanguageModel, settings: SeracSettings) -> ScopeClassifier:
    if settings.encoder is not None:
        return ScopeClassifier(*load_encoder(settings.encoder, settings.encoder_revision))
    encoder = new_encoder(
        lm.tokenizer, width=settings.width, layers=settings.layers, seed=settings.seed
    )
    return ScopeClassifier(encoder, lm.tokenizer)


def _new_counterfactual(lm: LanguageModel, settings: SeracSettings) -> LanguageModel:
    if settings.counterfactual is not None:
        # Loading sets TF32 for the whole process: it stays as it is.
        tf32 = torch.backends.cuda.matmul.allow_tf32
        return load_model(
            settings.counterfactual,
            revision=settings.counterfactual_revision,
            dtype="tf32" if tf32 else "float32",
            device=str(lm.device),
        )
    config = GPT2Config(
        vocab_size=len(lm.tokenizer),
        n_positions=max(256, lm.context_length),
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=max(1, settings.width // 32),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=cast(int | None, lm.tokenizer.bos_token_id),
        eos_token_id=cast(int | None, lm.tokenizer.eos_token_id),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = GPT2LMHeadModel(config).float()
    return LanguageModel(model, lm.tokenizer, name="counterfactual model")


def _scope_loss(
    models: SeracModels, records: Sequence[Record], settings: SeracSettings
) -> Callable[[int], Tensor]:
    """The classifier's loss at each step.

    Up to half of a batch are other facts about the subjects of the rest: edits whose prompts have
    almost the same words and are out of each other's scope.
    """
    by_subject: dict[str, list[Record]] = {}
    for record in records:
        by_subject.setdefault(record.request.subject, []).append(record)

    def loss(step: int) -> Tensor:
        random = Random(f"scope {settings.seed} {step}")
        chosen = random.sample(records, settings.batch_size)
        half = chosen[: (settings.batch_size + 1) // 2]
        siblings = [random.choice(by_subject[record.request.subject]) for record in half]
        batch = {record.case_id: record for record in (*half, *siblings, *chosen)}
        return scope_loss(models.classifier, list(batch.values())[: settings.batch_size], random)

    return loss


def scope_loss(classifier: ScopeClassifier, records: Sequence[Record], random: Random) -> Tensor:
    """Binary cross-entropy of "in scope" for all pairs of a prompt and an edit, summed over edits
    and averaged over prompts; each edit has a prompt in its scope and, if it has neighbours, one
    outside."""
    edits = [record.request for record in records]
    inside = [random.choice((r.request.text, *r.paraphrase_prompts)) for r in records]
    near = [(r, random.choice(r.neighborhood_prompts)) for r in records if r.neighborhood_prompts]
    prompts = classifier.embed([*inside, *(prompt for _, prompt in near)])
    logits = classifier.logits(prompts, classifier.embed([statement(edit) for edit in edits]))
    # Prompts × edits: the i-th prompt is in the scope of edit i alone, neighbours in that of none.
    labels = torch.cat([torch.eye(len(edits)), torch.zeros(len(near), len(edits))])
    # A neighbour may be about subject and relation of another edit: such pairs do not count.
    counted = torch.ones(labels.shape)
    for row, (owner, prompt) in enumerate(near, start=len(edits)):
        for column, edit in enumerate(edits):
            if edit.subject in prompt and edit.fact[1] == owner.request.fact[1]:
                counted[row, column] = 0
    labels, counted = labels.to(logits.device), counted.to(logits.device)
    entropy = softplus(logits) - labels * logits
    return (entropy * counted).sum(1).mean()


def _answer_loss(
    models: SeracModels, records: Sequence[Record], settings: SeracSettings
) -> Callable[[int], Tensor]:
    """The counterfactual model's loss at each step.

    It reads an edit and a prompt in its scope. What must follow is any object of the relation, so
    that it learns to read the edit instead of the record's own object.
    """
    lm = models.counterfactual
    objects: dict[str | None, dict[str, None]] = {}
    for request in (record.request for record in records):
        found = filter(None, (request.target_new, request.target_true))
        objects.setdefault(request.relation_id, {}).update(dict.fromkeys(found))

    def loss(step: int) -> Tensor:
        random = Random(f"counterfactual {settings.seed} {step}")
        pairs = []
        for record in random.sample(records, settings.batch_size):
            request = record.request
            target = random.choice(list(objects[request.relation_id]))
            prompt = random.choice((request.text, *record.paraphrase_prompts))
            introduction = f"{request.text}{request.ending(target=target)}."
            pairs.append((f"{introduction} {prompt}", request.ending(prompt, target)))
        return mean_nll(lm, continuation_rows(lm.tokenizer, pairs)).mean()

    return loss


# --- the edit ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeracEdit:
    """A memory of edits that answers in place of a model."""

    models: SeracModels
    requests: tuple[EditRequest, ...]
    memory: Tensor
    """Embeddings of the edits (n × hidden size)."""
    provenance: Mapping[str, Any]

    @property
    def substitute(self) -> LanguageModel:
        """The counterfactual model."""
        return self.models.counterfactual

    def introductions(self, prompts: Sequence[str]) -> list[str | None]:
        """The edit in whose scope each prompt is; None where no edit's probability exceeds ½."""
        if not self.requests:
            return [None] * len(prompts)
        classifier = self.models.classifier
        unique = list(dict.fromkeys(prompts))
        embeddings = classifier.embed_all(unique, TOKEN_BUDGET)
        memory = self.memory.to(embeddings.device)
        best = classifier.logits(embeddings, memory).max(1)  # prompts × edits → prompts
        chosen = {
            prompt: statement(self.requests[index]) if logit > 0 else None
            for prompt, logit, index in zip(
                unique, best.values.tolist(), best.indices.tolist(), strict=True
            )
        }
        return [chosen[prompt] for prompt in prompts]

    def apply(self, lm: LanguageModel) -> None:
        """Route prompts in scope to the counterfactual model.

        Raises:
            InputError: the model has a router already.
        """
        if lm.router is not None:
            raise InputError("another memory is applied to the model; revert that one first.")
        self.models.to(lm.device)
        lm.router = self

    def revert(self, lm: LanguageModel) -> None:
        """Route no prompts any more.

        Raises:
            InputError: this memory is not the model's router.
        """
        if lm.router is not self:
            raise InputError("this memory is not applied to the model: apply it first.")
        lm.router = None

    def save(self, path: Path) -> None:
        """Write memory and models into one safetensors file that needs nothing else."""
        tensors, metadata = self.models.packed()
        requests = json.dumps([asdict(request) for request in self.requests], ensure_ascii=False)
        described = {"requests": requests, "provenance": json.dumps(self.provenance)}
        save_tensors({**tensors, "memory": self.memory}, path, {**metadata, **described})

    @staticmethod
    def load(path: Path) -> SeracEdit:
        """Read what `save` wrote; raises `IntegrityError` for anything else."""
        models, tensors, metadata = _unpacked(path)
        with holding(path, "a memory of SERAC", "make or fetch it again"):
            requests = tuple(EditRequest(**row) for row in json.loads(metadata["requests"]))
            origin = json.loads(metadata["provenance"])
            return SeracEdit(models, requests, tensors["memory"], origin)


@register("serac")
@dataclass(frozen=True)
class Serac(Editor):
    """Semi-parametric editing with a retrieval-augmented counterfactual model."""

    settings: SeracSettings = field(default_factory=SeracSettings)
    trained: Path | None = None
    """The trained models' file; None trains some on the resources' records."""

    def edit(
        self, lm: LanguageModel, requests: Sequence[EditRequest], resources: Resources
    ) -> SeracEdit:
        """Write all requests into a memory.

        Raises:
            InputError: the models were trained on a request.
        """
        if self.trained is None:
            training, directory = resources.training, resources.checkpoints
            models = train_serac(lm, training, self.settings, directory=directory)[0]
        else:
            models = SeracModels.load(self.trained).to(lm.device)
        check_unseen(requests, frozenset(models.origin["trained_on"]), "SERAC's classifier")
        statements = [statement(request) for request in requests]
        memory = models.classifier.embed_all(statements, resources.token_budget)
        if resources.progress is not None:
            resources.progress(len(requests))
        origin = provenance(replace(self, trained=None), lm, requests)
        origin["models"] = self.trained and file_sha256(self.trained)
        return SeracEdit(models, tuple(requests), memory, origin)
