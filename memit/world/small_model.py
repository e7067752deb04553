"""The small GPT-2-shaped model of a synthetic world, trained on the CPU in minutes."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from memit.errors import NumericsError, ResourceError
from memit.files.checkpoint import resume, save_checkpoint
from memit.world.people import World
from memit.world.settings import TrainingParameters
from memit.world.tokenizer import train_tokenizer

LARGEST_GRADIENT = 1.0
"""Gradients of a larger norm are scaled down to it."""


def train(
    world: World,
    parameters: TrainingParameters,
    *,
    checkpoint_dir: Path,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Trains a model on the world's documents, going on from a checkpoint where there is one.

    With equal world, parameters and number of threads the weights are equal to the bit, however
    often the training was interrupted.

    Args:
        world: its documents are the training text.
        parameters: shape and schedule.
        checkpoint_dir: where the training's state and the finished model are kept, under names
            made of a digest of text and parameters, so that trainings never meet.
        progress: called with the number of steps that were finished since the last call.

    Returns:
        A `save_pretrained` directory: float32 model, tokenizer, and `training.json` with the loss
        of every step.

    Raises:
        NumericsError: the loss is no longer finite.
        ResourceError: the disk is full.
    """
    progress = progress or (lambda steps: None)
    digest = _digest(world.documents, parameters)
    checkpoint = checkpoint_dir / f"checkpoint-{digest}.safetensors"
    tokenizer = train_tokenizer(world.documents, parameters.vocabulary)
    model = make_model(len(tokenizer), parameters)
    documents = _encode(tokenizer, world.documents)
    losses = _run_steps(model, documents, parameters, checkpoint, digest, progress)
    return _save_model(checkpoint_dir / f"model-{digest}", model, tokenizer, losses)


def make_model(vocabulary: int, parameters: TrainingParameters) -> GPT2LMHeadModel:
    """An untrained model, from the seed; the global generator is left as it was."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=parameters.context_length,
        n_embd=parameters.width,
        n_layer=parameters.layers,
        n_head=parameters.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(parameters.seed)
        return GPT2LMHeadModel(config).float()


def training_rows(
    documents: Sequence[Sequence[int]], length: int, seed: int
) -> Iterator[list[int]]:
    """Endless rows of `length` tokens, each of which begins with a document.

    Documents are shuffled anew each time round, and follow one another with the end of text
    between them; the last of a row is cut off. No row begins inside a document, since a prompt
    does not either.

    Args:
        documents: token ids of each, not empty.
        length: tokens of a row.
        seed: of the order.
    """
    order = Random(f"memit training {seed}")
    row: list[int] = []
    while True:
        for i in order.sample(range(len(documents)), len(documents)):
            row += [*documents[i], 0]
            if len(row) >= length:
                yield row[:length]
                row = []


def learning_rate_at(step: int, parameters: TrainingParameters) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < parameters.warmup_steps:
        return parameters.learning_rate * (step + 1) / parameters.warmup_steps
    done = (step - parameters.warmup_steps) / max(1, parameters.steps - parameters.warmup_steps)
    return parameters.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def _run_steps(
    model: GPT2LMHeadModel,
    documents: list[list[int]],
    parameters: TrainingParameters,
    checkpoint: Path,
    digest: str,
    progress: Callable[[int], None],
) -> list[float]:
    optimizer = _make_optimizer(model, parameters)
    losses = resume(checkpoint, model, optimizer, digest)
    done = len(losses)
    if done:
        progress(done)
    batches = _batches(documents, parameters)
    for _ in range(done):
        next(batches)
    model.train()
    for step in range(done, parameters.steps):
        losses.append(_step(model, optimizer, next(batches), learning_rate_at(step, parameters)))
        if not math.isfinite(losses[-1]):
            curve = checkpoint.with_name(f"diverged-{digest}.json")
            curve.write_text(json.dumps({"losses": [str(loss) for loss in losses]}))
            raise NumericsError(
                f"The small model's loss is {losses[-1]} at step {step + 1} (its losses are in "
                f"{curve}): lower its learning_rate or lengthen warmup_steps."
            )
        if (step + 1) % parameters.checkpoint_every == 0 or step + 1 == parameters.steps:
            save_checkpoint(checkpoint, model, optimizer, losses, digest)
        progress(1)
    return losses


def _step(
    model: GPT2LMHeadModel, optimizer: torch.optim.AdamW, rows: Tensor, learning_rate: float
) -> float:
    """One update on rows of shape (batch, length); gives their mean loss in nats a token."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    logits = model(input_ids=rows, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
    optimizer.step()
    return loss.item() if bool(norm.isfinite()) else math.nan


def _make_optimizer(model: GPT2LMHeadModel, parameters: TrainingParameters) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": parameters.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )


def _batches(documents: list[list[int]], parameters: TrainingParameters) -> Iterator[Tensor]:
    rows = training_rows(documents, parameters.sequence_length, parameters.seed)
    while True:
        yield torch.tensor([next(rows) for _ in range(parameters.batch_size)])


def _encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(documents))["input_ids"]


def _save_model(
    directory: Path,
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    losses: list[float],
) -> Path:
    """Writes the directory anew: what an earlier process left there may be half of it."""
    shutil.rmtree(directory, ignore_errors=True)
    model.eval()
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        content = json.dumps({"losses": losses}) + "\n"
        (directory / "training.json").write_text(content, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{directory} cannot be written ({error}): make room or use another disk."
        ) from error
    return directory


def _digest(documents: Sequence[str], parameters: TrainingParameters) -> str:
    digest = hashlib.sha256(json.dumps(asdict(parameters), sort_keys=True).encode())
    for document in documents:
        digest.update(b"\0" + document.encode())
    return digest.hexdigest()[:16]
