"""Algorithm 1 word by word: one edit at a time, whole forward passes, nothing shared or cached.

This is what the fast code is compared with, and what the benchmark times it against. It shares
nothing with ``memit``: blocks are found through a table of names, positions by decoding longer and
longer prefixes, and every tensor by an ordinary forward hook. Only ``torch`` and ``transformers``
models are needed. Requests, records and hyperparameters are anything with the attributes below.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Request(Protocol):
    """What an edit asks for; ``prompt`` holds one ``{}``."""

    @property
    def subject(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def target_new(self) -> str: ...
    @property
    def target_true(self) -> str | None: ...


class Record(Protocol):
    """A request with the prompts that measure it."""

    @property
    def request(self) -> Any: ...
    @property
    def paraphrase_prompts(self) -> Sequence[str]: ...
    @property
    def neighborhood_prompts(self) -> Sequence[str]: ...


class Method(Protocol):
    """The hyperparameters of Algorithm 1."""

    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def covariance_weight(self) -> float: ...
    @property
    def evaluations(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def clamp_factor(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def kl_factor(self) -> float: ...
    @property
    def loss_threshold(self) -> float: ...
    @property
    def key_average(self) -> str: ...


# --- where things are -------------------------------------------------------------------------

_LLAMA_LIKE = ("model.layers", "mlp.down_proj")
_NAMES = {
    "gpt2": ("transformer.h", "mlp.c_proj"),
    "gptj": ("transformer.h", "mlp.fc_out"),
    "gpt_neo": ("transformer.h", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gemma3_text": _LLAMA_LIKE,
    "cohere": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "granite": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "opt": ("model.decoder.layers", "fc2"),
    "phi": ("model.layers", "mlp.fc2"),
    "bloom": ("transformer.h", "mlp.dense_4h_to_h"),
    "falcon": ("transformer.h", "mlp.dense_4h_to_h"),
}
_TRANSPOSED = ("gpt2",)


def block(model: PreTrainedModel, layer: int) -> nn.Module:
    """The decoder block number ``layer``."""
    blocks, _ = _NAMES[model.config.model_type]
    return model.get_submodule(f"{blocks}.{layer}")


def down_projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """The module that holds W_out of ``layer``."""
    _, projection = _NAMES[model.config.model_type]
    return block(model, layer).get_submodule(projection)


def weight(model: PreTrainedModel, layer: int) -> Tensor:
    """A d × f view of W_out; writing into it changes the model."""
    stored = down_projection(model, layer).get_parameter("weight").data
    return stored.T if model.config.model_type in _TRANSPOSED else stored


# --- text to rows of tokens -------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One tokenised string: the subject's last token, and the target's tokens (maybe none)."""

    ids: list[int]
    subject_last: int
    target: range


def token_ids(tokenizer, text: str) -> list[int]:
    """The whole string, tokenised once, as the tokenizer does by default."""
    return list(tokenizer(text)["input_ids"])


def _decode(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    ).lstrip(" ")


def token_completing(tokenizer, ids: Sequence[int], text: str) -> int:
    """The first token with which the decoded ids begin with ``text``."""
    text = text.lstrip(" ")

    def complete(i: int) -> bool:
        return _decode(tokenizer, ids[: i + 1]).startswith(text)

    found = bisect.bisect_left(range(len(ids)), True, key=complete)
    # A decoder of bytes takes back what it has said while the next character is unfinished.
    while earlier := [i for i in range(max(0, found - 4), found) if complete(i)]:
        found = earlier[0]
    if found == len(ids):
        raise AssertionError(f"{text!r} is not what {list(ids)} decodes to")
    return found


def target_tokens(tokenizer, ids: Sequence[int], prompt: str) -> range:
    """The tokens after ``prompt``: back from the end while fewer ids still say more than it."""
    prompt = prompt.lstrip(" ")
    end = len(ids)
    while ids[end - 1] in tokenizer.all_special_ids:
        end -= 1
    first = end
    while (shorter := _decode(tokenizer, ids[:first])).startswith(prompt) and shorter != prompt:
        first -= 1
    return range(first, end)


def fill(template: str, subject: str) -> str:
    """The template with its only ``{}`` replaced."""
    before, after = template.split("{}")
    return before + subject + after


def row(tokenizer, prefix: str, template: str, subject: str, target: str = "") -> Row:
    """``prefix`` + filled template + ``" target"``, with both positions found by decoding."""
    prompt = prefix + fill(template, subject)
    text = f"{prompt} {target}" if target else prompt
    ids = token_ids(tokenizer, text)
    subject_end = prefix + template.split("{}")[0] + subject
    subject_last = token_completing(tokenizer, ids, subject_end)
    if not target:
        return Row(ids, subject_last, range(0))
    return Row(ids, subject_last, target_tokens(tokenizer, ids, prompt))


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """The rows as one right-padded batch, with nothing but ids and mask."""
    width = max(len(ids) for ids in rows)
    return {
        "input_ids": torch.tensor([list(ids) + [0] * (width - len(ids)) for ids in rows]).to(
            device
        ),
        "attention_mask": torch.tensor(
            [[1] * len(ids) + [0] * (width - len(ids)) for ids in rows]
        ).to(device),
    }


# --- hooks ------------------------------------------------------------------------------------


@contextmanager
def hooked(module: nn.Module, hook: Callable) -> Iterator[None]:
    """``hook`` on the module's forward while the block lasts."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def hidden_of(output) -> Tensor:
    """A block's hidden states, whether it returns them bare or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _with_hidden(output, hidden: Tensor):
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient while the block lasts."""
    before = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(required)


# --- the covariance ---------------------------------------------------------------------------


class _Stop(Exception):
    """Ends a forward pass at the hooked layer."""


@torch.no_grad()
def covariance(
    model,
    tokenizer,
    documents: Sequence[str],
    layer: int,
    *,
    dtype: torch.dtype = torch.float64,
    batch: int = 1,
) -> Tensor:
    """Mean of k kᵀ (f × f) over all tokens of the documents: one pass for this layer alone."""
    model.eval()
    limit = getattr(model.config, "max_position_embeddings", 2048)
    rows = [
        list(tokenizer(document, add_special_tokens=False)["input_ids"])[:limit]
        for document in documents
    ]
    rows = [ids for ids in rows if ids]
    total: Any = 0
    count = 0
    mask = torch.empty(0)

    def collect(module, inputs, output):
        nonlocal total, count
        keys = inputs[0].reshape(*mask.shape, -1)[mask].to(dtype)
        total = total + keys.T @ keys
        count += len(keys)
        raise _Stop

    device = next(model.parameters()).device
    with hooked(down_projection(model, layer), collect):
        for start in range(0, len(rows), batch):
            inputs = pad(rows[start : start + batch], device)
            mask = inputs["attention_mask"].bool()
            try:
                model(**inputs, use_cache=False)
            except _Stop:
                continue
    return total / count


# --- targets (Eqn. 16; Algorithm 1, lines 1-4) ------------------------------------------------


@dataclass(frozen=True)
class Target:
    """z = h + δ at the last edited layer, and the loss of every evaluation made."""

    z: Tensor
    hidden: Tensor
    losses: list[float]


def target(model, tokenizer, request: Request, prefixes: Sequence[str], hp: Method) -> Target:
    """Optimise δ for one request; all its rows and the KL row go through one padded forward."""
    model.eval()
    rows = [
        row(tokenizer, prefix, request.prompt, request.subject, request.target_new.strip())
        for prefix in ("", *prefixes)
    ]
    rows.append(row(tokenizer, "", "{} is a", request.subject))
    device = next(model.parameters()).device
    inputs = pad([r.ids for r in rows], device)
    indices = torch.arange(len(rows), device=device)
    positions = torch.tensor([r.subject_last for r in rows], device=device)
    state: dict[str, Tensor] = {}

    def add_delta(module, args, output):
        hidden = hidden_of(output)
        if "hidden" not in state:
            state["hidden"] = hidden[0, positions[0]].detach().clone()
            state["delta"] = torch.zeros_like(state["hidden"], requires_grad=True)
        changed = hidden.clone()
        changed[indices, positions] = changed[indices, positions] + state["delta"]
        return _with_hidden(output, changed)

    losses: list[float] = []
    initial = optimizer = None
    with frozen(model), hooked(block(model, hp.layers[-1]), add_delta):
        for evaluation in range(hp.evaluations):
            logits = model(**inputs, use_cache=False).logits
            delta, hidden = state["delta"], state["hidden"]
            current = logits[-1, positions[-1]].log_softmax(-1)
            if optimizer is None or initial is None:
                optimizer = torch.optim.Adam([delta], lr=hp.learning_rate)
                initial = current.detach()
            likelihood = torch.stack([_nll(logits[i], r) for i, r in enumerate(rows[:-1])]).mean()
            divergence = (current.exp() * (current - initial)).sum()
            decay = delta.norm() / hidden.norm() ** 2
            loss = likelihood + hp.kl_factor * divergence + hp.weight_decay * decay
            losses.append(loss.item())
            if loss < hp.loss_threshold or evaluation == hp.evaluations - 1:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bound = hp.clamp_factor * hidden.norm()
            with torch.no_grad():
                if delta.norm() > bound:
                    delta.mul_(bound / delta.norm())
    return Target(state["hidden"] + state["delta"].detach(), state["hidden"], losses)


def _nll(logits: Tensor, r: Row) -> Tensor:
    """Mean of −log p over the row's target tokens; the logits are those of the whole row."""
    before = torch.tensor([i - 1 for i in r.target], device=logits.device)
    wanted = torch.tensor([r.ids[i] for i in r.target], device=logits.device)
    return -logits[before].log_softmax(-1).gather(1, wanted[:, None]).mean()


# --- spread (Eqns. 17-20; Algorithm 1, lines 5-15) --------------------------------------------


@torch.no_grad()
def key_and_hidden(
    model, tokenizer, request: Request, prefixes: Sequence[str], layer: int, hp: Method
) -> tuple[Tensor, Tensor]:
    """(k_i at ``layer``, h_i at the last edited layer), from one padded forward of the rows."""
    model.eval()
    rows = [row(tokenizer, prefix, request.prompt, request.subject) for prefix in ("", *prefixes)]
    device = next(model.parameters()).device
    inputs = pad([r.ids for r in rows], device)
    indices = torch.arange(len(rows), device=device)
    positions = torch.tensor([r.subject_last for r in rows], device=device)
    seen: dict[str, Tensor] = {}

    def read_keys(module, args, output):
        # OPT hands its MLP rows · tokens in one dimension.
        keys = args[0].reshape(*inputs["input_ids"].shape, -1)
        seen["keys"] = keys[indices, positions].detach().clone()

    def read_hidden(module, args, output):
        seen["hidden"] = hidden_of(output)[0, positions[0]].detach().clone()

    with (
        hooked(down_projection(model, layer), read_keys),
        hooked(block(model, hp.layers[-1]), read_hidden),
    ):
        model(**inputs, use_cache=False)
    keys = seen["keys"]
    if hp.key_average == "uniform" or len(rows) == 1:
        return keys.mean(0), seen["hidden"]
    return (keys[0] + keys[1:].mean(0)) / 2, seen["hidden"]


@dataclass(frozen=True)
class LayerUpdate:
    """What one layer of the spread used and gave: K (n × f), R (n × d), Δ (d × f)."""

    keys: Tensor
    residuals: Tensor
    delta: Tensor


def update(keys: Tensor, residuals: Tensor, covariance: Tensor, hp: Method) -> Tensor:
    """Δ = R Kᵀ (λC + K Kᵀ)⁻¹ (d × f) in float64, by LU; keys n × f, residuals n × d."""
    K = keys.double().T
    R = residuals.double().T
    A = torch.linalg.solve(hp.covariance_weight * covariance.double() + K @ K.T, K)
    return R @ A.T


@torch.no_grad()
def spread(
    model,
    tokenizer,
    requests: Sequence[Request],
    prefixes: Sequence[str],
    z: Tensor,
    covariances: Mapping[int, Tensor],
    hp: Method,
) -> dict[int, LayerUpdate]:
    """The update of every layer; the model is given back with its own weights."""
    layers = sorted(hp.layers)
    original = {layer: weight(model, layer).clone() for layer in layers}
    updates: dict[int, LayerUpdate] = {}
    try:
        for done, layer in enumerate(layers):
            seen = [key_and_hidden(model, tokenizer, r, prefixes, layer, hp) for r in requests]
            keys = torch.stack([key for key, _ in seen])
            hidden = torch.stack([h for _, h in seen])
            residuals = (z - hidden) / (len(layers) - done)
            delta = update(keys, residuals, covariances[layer], hp).to(keys.dtype)
            weight(model, layer).add_(delta)
            updates[layer] = LayerUpdate(keys, residuals, delta)
    finally:
        for layer in layers:
            weight(model, layer).copy_(original[layer])
    return updates


@contextmanager
def edited(model, updates: Mapping[int, LayerUpdate]) -> Iterator[None]:
    """The model with the updates added, its own weights back afterwards."""
    original = {layer: weight(model, layer).clone() for layer in updates}
    try:
        for layer, layer_update in updates.items():
            weight(model, layer).add_(layer_update.delta)
        yield
    finally:
        for layer, value in original.items():
            weight(model, layer).copy_(value)


# --- evaluation -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Mean nll per token of an object after a prompt, and whether argmax gives all its tokens."""

    nll: float
    hit: bool


def _continuation(tokenizer, prompt: str, target: str) -> Row:
    text = f"{prompt} {target.strip()}"
    ids = token_ids(tokenizer, text)
    return Row(ids, 0, target_tokens(tokenizer, ids, prompt))


def _score(logits: Tensor, r: Row) -> Score:
    before = [i - 1 for i in r.target]
    guessed = logits[before].argmax(-1).tolist()
    return Score(_nll(logits, r).item(), guessed == [r.ids[i] for i in r.target])


@torch.no_grad()
def score(model, tokenizer, prompt: str, target: str) -> Score:
    """One forward for one prompt and object."""
    model.eval()
    r = _continuation(tokenizer, prompt, target)
    logits = model(**pad([r.ids], next(model.parameters()).device), use_cache=False).logits
    return _score(logits[0], r)


@torch.no_grad()
def score_together(model, tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    """Several prompts and objects in one padded forward."""
    model.eval()
    rows = [_continuation(tokenizer, prompt, target) for prompt, target in pairs]
    inputs = pad([r.ids for r in rows], next(model.parameters()).device)
    logits = model(**inputs, use_cache=False).logits
    return [_score(logits[i], r) for i, r in enumerate(rows)]


@dataclass(frozen=True)
class ScoredPrompt:
    """One prompt of a record with the scores of both objects."""

    kind: str
    prompt: str
    new: Score
    true: Score


def prompts_of(record: Record) -> list[tuple[str, str]]:
    """(kind, prompt) of everything that measures the record."""
    request = record.request
    return [
        ("rewrite", fill(request.prompt, request.subject)),
        *(("paraphrase", prompt) for prompt in record.paraphrase_prompts),
        *(("neighborhood", prompt) for prompt in record.neighborhood_prompts),
    ]


def evaluate(model, tokenizer, record: Record) -> list[ScoredPrompt]:
    """All prompts of a record with both objects, in one padded forward."""
    prompts = prompts_of(record)
    objects = (record.request.target_new, record.request.target_true)
    scores = score_together(
        model, tokenizer, [(prompt, target) for _, prompt in prompts for target in objects]
    )
    return [
        ScoredPrompt(kind, prompt, scores[2 * i], scores[2 * i + 1])
        for i, (kind, prompt) in enumerate(prompts)
    ]


def evaluate_singly(model, tokenizer, record: Record) -> list[ScoredPrompt]:
    """The same with a forward for every prompt and object."""
    request = record.request
    return [
        ScoredPrompt(
            kind,
            prompt,
            score(model, tokenizer, prompt, request.target_new),
            score(model, tokenizer, prompt, request.target_true),
        )
        for kind, prompt in prompts_of(record)
    ]


def success(scored: ScoredPrompt) -> bool:
    """The asked-for object is the likelier one; a tie fails."""
    if scored.kind == "neighborhood":
        return scored.true.nll < scored.new.nll
    return scored.new.nll < scored.true.nll


def correct(scored: ScoredPrompt) -> bool:
    """Argmax gives the asked-for object."""
    return (scored.true if scored.kind == "neighborhood" else scored.new).hit


def magnitude(scored: ScoredPrompt) -> float:
    """Probability of the asked-for object less that of the other one."""
    new = torch.tensor(-scored.new.nll, dtype=torch.float64).exp().item()
    true = torch.tensor(-scored.true.nll, dtype=torch.float64).exp().item()
    return true - new if scored.kind == "neighborhood" else new - true


_SUMMARY_NAMES = {"rewrite": "efficacy", "paraphrase": "paraphrase", "neighborhood": "neighborhood"}


def _mean_of_means(
    records: Sequence[Sequence[ScoredPrompt]], kind: str, measure: Callable[[ScoredPrompt], float]
) -> float | None:
    means = [
        statistics.fmean(measure(scored) for scored in record if scored.kind == kind)
        for record in records
        if any(scored.kind == kind for scored in record)
    ]
    return 100 * statistics.fmean(means) if means else None


def summary(records: Sequence[Sequence[ScoredPrompt]]) -> dict[str, float]:
    """Success, accuracy and magnitude of each kind and the harmonic mean S, all times 100."""
    result: dict[str, float] = {}
    for kind, name in _SUMMARY_NAMES.items():
        for suffix, measure in (("", success), ("_accuracy", correct), ("_magnitude", magnitude)):
            value = _mean_of_means(records, kind, measure)
            if value is not None:
                result[name + suffix] = value
    parts = [result[name] for name in _SUMMARY_NAMES.values() if name in result]
    if len(parts) == 3:
        result["score"] = statistics.harmonic_mean(parts)
    return result
