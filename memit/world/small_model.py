"""The small GPT-2-shaped model of a synthetic world, trained on the CPU in minutes."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from memit.files.atomic import remove, write_whole
from memit.files.digests import content_digest
from memit.training import Training, run_training
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
    """Train a model on the world's documents, resuming from a checkpoint if there is one.

    With equal world, parameters and number of threads the weights are equal to the bit, however
    often the training was interrupted. Checkpoint and model are kept in `checkpoint_dir`, named by
    a digest of text and parameters. `progress` is called with the number of newly finished steps.

    Gives a `save_pretrained` directory: float32 model, tokenizer, and `training.json` with the loss
    of every step.

    Raises:
        NumericsError: the training diverges.
        ResourceError: the disk is full.
    """
    digest = content_digest([world.documents, asdict(parameters)])[:16]
    tokenizer = train_tokenizer(world.documents, parameters.vocabulary)
    model = make_model(len(tokenizer), parameters).train()
    documents = tokenizer(list(world.documents))["input_ids"]
    training = Training(
        f"small-model-{digest}",
        parameters.steps,
        checkpoint_dir,
        LARGEST_GRADIENT,
        lambda _, step: learning_rate_at(step, parameters),
        parameters.checkpoint_every,
        progress,
    )
    optimizer = _make_optimizer(model, parameters)
    losses = run_training(training, model, optimizer, _loss_at(model, documents, parameters))
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

    In each epoch the documents (token ids, not empty) are shuffled and joined by the end of text;
    the last one of a row is cut off. No row begins inside a document, as no prompt does.
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


def _loss_at(
    model: GPT2LMHeadModel, documents: list[list[int]], parameters: TrainingParameters
) -> Callable[[int], Tensor]:
    """The mean loss of each step's rows, in nats a token; steps must ascend."""
    endless = training_rows(documents, parameters.sequence_length, parameters.seed)
    size, finished = parameters.batch_size, 0

    def loss_at(step: int) -> Tensor:
        nonlocal finished
        batch = islice(endless, (step - finished) * size, (step - finished + 1) * size)
        finished = step + 1
        rows = torch.tensor(list(batch))  # batch × length
        logits = model(input_ids=rows, use_cache=False).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())

    return loss_at


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


def _save_model(
    directory: Path,
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    losses: list[float],
) -> Path:

    def write(partial: Path) -> None:
        model.eval().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        content = json.dumps({"losses": losses}) + "\n"
        (partial / "training.json").write_text(content, encoding="utf-8")

    remove(directory)
    write_whole(directory, write)
    return directory
