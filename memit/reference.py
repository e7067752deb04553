"""MEMIT as its authors run it, step by step: read this first.

Algorithm 1 of Meng et al., *Mass-Editing Memory in a Transformer*, one fact at a time, with whole
forward passes and dense matrices; nothing is shared or cached. It imports nothing else from this
package. `memit.edit` computes the same result many times faster; tests compare it with this module,
and this module with a recorded run of the published code.

    # with a model and a tokenizer from transformers, and facts = [r.request for r in records]
    with edited(model, edit(model, tokenizer, facts, documents, settings)):
        print(evaluate(model, tokenizer, records[0]))

Symbols: n facts; d, the hidden size; f, the inner size of an MLP, whose down-projection W_out is
d × f; S, the edited layers, the last of which is L; x_j, the prefixes; k, an input of W_out (a key,
f numbers); h, an output of block L (d numbers); z = h + δ, what h should become; C, the second
moment of the keys over a corpus, and λ, its weight; K (f × n), R (d × n), keys and residuals of all
facts; Δ (d × f), what is added to W_out.

A *fact* is any object with `subject`, `prompt` (which contains `{}` once), `target_new` and
`target_true`. A *record* has `request` (a fact), `paraphrase_prompts` and `neighborhood_prompts`.
*Settings* have the attributes of `memit.Hyperparameters`. The model is in evaluation mode.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# --- modules ----------------------------------------------------------------------------------

NAMES = {
    "gpt2": ("transformer.h", "mlp.c_proj"),
    "gptj": ("transformer.h", "mlp.fc_out"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "llama": ("model.layers", "mlp.down_proj"),
}
"""Names of the list of blocks and, in a block, of W_out, by `model.config.model_type`."""


def block(model, layer: int) -> nn.Module:
    """A decoder block."""
    return model.get_submodule(f"{NAMES[model.config.model_type][0]}.{layer}")


def down_projection(model, layer: int) -> nn.Module:
    """The module of W_out."""
    return block(model, layer).get_submodule(NAMES[model.config.model_type][1])


def weight(model, layer: int) -> Tensor:
    """W_out (d × f), a view; GPT-2 stores it transposed."""
    module = down_projection(model, layer)
    stored = module.get_parameter("weight").data
    return stored.T if isinstance(module, Conv1D) else stored


def hidden_of(output: Any) -> Tensor:
    """The hidden states among the outputs of a block, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


# --- from text to positions -------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Token ids of a text, the position of the subject's last token, and those of the target."""

    ids: list[int]
    subject_last: int
    target: range


def row(tokenizer, prefix: str, template: str, subject: str, target: str = "") -> Row:
    """Tokenise prefix, prompt and target as one string: the tokens of parts are not those of the
    whole, because of spaces and special tokens. Without a target, its range is empty."""
    before, after = template.split("{}")
    to_subject = prefix + before + subject
    prompt = to_subject + after
    ids = tokenizer(f"{prompt} {target}" if target else prompt)["input_ids"]
    last = token_completing(tokenizer, ids, to_subject)
    return Row(ids, last, target_tokens(tokenizer, ids, prompt) if target else range(0))


def continuation(tokenizer, prompt: str, target: str) -> Row:
    """The row of a prompt whose subject does not matter."""
    ids = tokenizer(f"{prompt} {target.strip()}")["input_ids"]
    return Row(ids, 0, target_tokens(tokenizer, ids, prompt))


def decode(tokenizer, ids: Sequence[int]) -> str:
    """The text of some tokens, without special ones."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(ids, **options).lstrip(" ")


def token_completing(tokenizer, ids: Sequence[int], text: str) -> int:
    """The first position up to which the tokens decode to something that begins with `text`."""
    text = text.lstrip(" ")

    def complete(i: int) -> bool:
        return decode(tokenizer, ids[: i + 1]).startswith(text)

    found = bisect_left(range(len(ids)), True, key=complete)
    # A character spans up to four tokens; inside it the decoded text may be shorter than before.
    while earlier := [i for i in range(max(0, found - 4), found) if complete(i)]:
        found = earlier[0]
    assert found < len(ids), f"{text!r} is not what {list(ids)} decodes to"
    return found


def target_tokens(tokenizer, ids: Sequence[int], prompt: str) -> range:
    """Positions of the tokens after `prompt`: those without which the rest decodes to it alone."""
    prompt = prompt.lstrip(" ")
    end = len(ids)
    while ids[end - 1] in tokenizer.all_special_ids:
        end -= 1
    first = end
    while (shorter := decode(tokenizer, ids[:first])).startswith(prompt) and shorter != prompt:
        first -= 1
    return range(first, end)


def padded(model, rows: Sequence[Row]) -> dict[str, Tensor]:
    """A forward pass's inputs, padded on the right. No token type ids: GPT-2 would add embeddings
    of words for them."""
    width = max(len(r.ids) for r in rows)
    ids = [r.ids + [0] * (width - len(r.ids)) for r in rows]
    mask = [[1] * len(r.ids) + [0] * (width - len(r.ids)) for r in rows]
    tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    return {name: tensor.to(model.device) for name, tensor in tensors.items()}


# --- Algorithm 1 ------------------------------------------------------------------------------


def edit(model, tokenizer, facts, documents, settings) -> dict[int, LayerUpdate]:
    """All of Algorithm 1; `edited` puts its result into the model."""
    x = sample_prefixes(model, tokenizer)
    C = {layer: covariance(model, tokenizer, documents, layer) for layer in settings.layers}
    z = torch.stack([target(model, tokenizer, fact, x, settings).z for fact in facts])
    return spread(model, tokenizer, facts, x, z, C, settings)


@torch.no_grad()
def sample_prefixes(model, tokenizer, seed: int = 0) -> list[str]:
    """x_j: five texts of ten tokens, in which the model continues a word, each with a full stop."""
    torch.manual_seed(seed)
    prefixes = []
    for word in ("The", "Therefore", "Because", "I", "You"):
        ids = torch.tensor([tokenizer(word)["input_ids"]], device=model.device)
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=5, max_length=10
        )
        prefixes.append(decode(tokenizer, written[0].tolist()) + ". ")
    return prefixes


class Stop(Exception):
    """Ends a forward pass."""


@torch.no_grad()
def covariance(model, tokenizer, documents, layer: int, dtype=torch.float64, batch=1) -> Tensor:
    """C = E[k kᵀ] (f × f), not centred, over all tokens of a corpus (Eqn. 14)."""
    limit = getattr(model.config, "max_position_embeddings", 2048)
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"][:limit] for text in documents]
    rows = [Row(ids, 0, range(0)) for ids in texts if ids]
    total: Any = 0
    seen: list[Tensor] = []

    def collect(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append(args[0])
        raise Stop

    for start in range(0, len(rows), batch):
        inputs = padded(model, rows[start : start + batch])
        with down_projection(model, layer).register_forward_hook(collect), suppress(Stop):
            model.base_model(**inputs, use_cache=False)
        keys = seen.pop().reshape(*inputs["input_ids"].shape, -1)
        keys = keys[inputs["attention_mask"].bool()].to(dtype)  # tokens × f
        total = total + keys.T @ keys
    return total / sum(len(r.ids) for r in rows)


@dataclass(frozen=True)
class Target:
    """z = h + δ (d), h (d), and the loss of each evaluation."""

    z: Tensor
    hidden: Tensor
    losses: list[float]


def target(model, tokenizer, fact, prefixes, settings) -> Target:
    """Lines 1-4, Eqn. 16: optimise δ, added to block L's output at the subject's last token."""
    model.requires_grad_(False)
    # The plain prompt, the prompt after each prefix, and a row for the divergence.
    new = fact.target_new.strip()
    rows = [row(tokenizer, x, fact.prompt, fact.subject, new) for x in ("", *prefixes)]
    rows.append(row(tokenizer, "", "{} is a", fact.subject))
    inputs = padded(model, rows)
    every, last = torch.arange(len(rows)), torch.tensor([r.subject_last for r in rows])
    top = settings.layers[-1]
    delta = weight(model, top).new_zeros(len(weight(model, top)), requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate)
    seen: dict[str, Tensor] = {}

    def add_delta(module: nn.Module, args: tuple, output: Any) -> Any:
        seen["h"] = hidden_of(output)[0, last[0]]  # the same each time: δ is added after it
        changed = hidden_of(output).clone()
        changed[every, last] = changed[every, last] + delta
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    losses: list[float] = []
    initial = torch.empty(0)  # log-probabilities with δ = 0, of the first evaluation
    with block(model, top).register_forward_hook(add_delta):
        for evaluation in range(settings.evaluations):
            logits = model(**inputs, use_cache=False).logits
            h = seen["h"]
            # −log p(target), mean over its tokens, then over all rows with it
            likelihood = torch.stack([nll(logits[i], r) for i, r in enumerate(rows[:-1])]).mean()
            # KL(current ‖ initial) of the next token at the subject in "{subject} is a"
            current = logits[-1, last[-1]].log_softmax(-1)
            if evaluation == 0:  # δ is 0
                initial = current.detach()
            divergence = (current.exp() * (current - initial)).sum()
            decay = delta.norm() / h.norm() ** 2
            loss = likelihood + settings.kl_factor * divergence + settings.weight_decay * decay
            losses.append(loss.item())
            if loss < settings.loss_threshold or evaluation == settings.evaluations - 1:
                break
            if settings.rate_unit == "relative":
                optimizer.param_groups[0]["lr"] = settings.learning_rate * rms(h)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():  # back into the ball ‖δ‖ ≤ clamp · ‖h‖
                delta.mul_((settings.clamp_factor * h.norm() / delta.norm()).clamp(max=1))
    return Target(seen["h"] + delta.detach(), seen["h"], losses)


def rms(h: Tensor) -> float:
    """Root mean square of some numbers."""
    return h.square().mean().sqrt().item()


def nll(logits: Tensor, r: Row) -> Tensor:
    """Mean over a row's target tokens of −log p, from the row's logits (tokens × vocabulary)."""
    before = torch.tensor([i - 1 for i in r.target], device=logits.device)
    wanted = torch.tensor([r.ids[i] for i in r.target], device=logits.device)
    return -logits[before].log_softmax(-1).gather(1, wanted[:, None]).mean()


@torch.no_grad()
def key_and_hidden(model, tokenizer, fact, prefixes, layer: int, settings) -> tuple[Tensor, Tensor]:
    """A fact's k at `layer` (f, Eqn. 19) and its plain prompt's h (d), with the current weights."""
    rows = [row(tokenizer, x, fact.prompt, fact.subject) for x in ("", *prefixes)]
    inputs = padded(model, rows)
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({name: (args[0], hidden_of(output))})

    top = block(model, settings.layers[-1])
    with (
        down_projection(model, layer).register_forward_hook(keep("W_out")),
        top.register_forward_hook(keep("L")),
    ):
        model(**inputs, use_cache=False)
    last = [r.subject_last for r in rows]
    keys = seen["W_out"][0].reshape(*inputs["input_ids"].shape, -1)[range(len(rows)), last]
    hidden = seen["L"][1][0, last[0]]
    if settings.key_average == "uniform" or len(rows) == 1:
        return keys.mean(0), hidden
    return (keys[0] + keys[1:].mean(0)) / 2, hidden  # nested, as in the published code


def update(K: Tensor, R: Tensor, C: Tensor, settings) -> Tensor:
    """Δ = R Kᵀ (λC + K Kᵀ)⁻¹ (d × f) for keys K (f × n) and residuals R (d × n), in float64."""
    K, R = K.double(), R.double()
    solved = torch.linalg.solve(settings.covariance_weight * C.double() + K @ K.T, K)
    return R @ solved.T  # the inverse is symmetric


@dataclass(frozen=True)
class LayerUpdate:
    """K (f × n), R (d × n) and Δ (d × f) of a layer."""

    K: Tensor
    R: Tensor
    delta: Tensor


@torch.no_grad()
def spread(
    model, tokenizer, facts, prefixes, z: Tensor, C: Mapping[int, Tensor], settings
) -> dict[int, LayerUpdate]:
    """Lines 5-15: the update of each layer, for targets z (n × d); the weights are restored."""
    factor = getattr(model.config, "residual_multiplier", 1.0)  # of W_out's output, in Granite
    updates: dict[int, LayerUpdate] = {}
    for layer in settings.layers:
        with edited(model, updates):  # the lower layers' updates are in place
            pairs = [key_and_hidden(model, tokenizer, f, prefixes, layer, settings) for f in facts]
        K = torch.stack([k for k, _ in pairs], 1)
        h = torch.stack([h for _, h in pairs], 1)
        R = (z.T - h) / (len(settings.layers) - len(updates)) / factor  # Eqn. 20
        updates[layer] = LayerUpdate(K, R, update(K, R, C[layer], settings).to(K.dtype))
    return updates


@contextmanager
def edited(model, updates: Mapping[int, LayerUpdate]) -> Iterator[None]:
    """Inside the context W_out + Δ in each layer; afterwards the original weights."""
    original = {layer: weight(model, layer).clone() for layer in updates}
    try:
        for layer, layer_update in updates.items():
            weight(model, layer).add_(layer_update.delta)
        yield
    finally:
        for layer, value in original.items():
            weight(model, layer).copy_(value)


# --- evaluation (section 5.2) -----------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """−log p of an object, mean over its tokens, and whether greedy decoding gives all of them."""

    nll: float
    hit: bool


@torch.no_grad()
def scores(model, tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    """Scores of pairs of a prompt and an object, in one forward pass."""
    rows = [continuation(tokenizer, prompt, target) for prompt, target in pairs]
    logits = model(**padded(model, rows), use_cache=False).logits
    best = logits.argmax(-1).tolist()
    return [
        Score(nll(logits[i], r).item(), all(best[i][p - 1] == r.ids[p] for p in r.target))
        for i, r in enumerate(rows)
    ]


def evaluate(model, tokenizer, record) -> list[tuple[str, Score, Score]]:
    """The kind of each prompt of a record, with the scores of the new and of the true object.

    A success is a smaller −log p of the new object than of the true one; for a neighbour, the
    reverse.
    """
    fact = record.request
    prompts = [("rewrite", fact.prompt.replace("{}", fact.subject))]
    prompts += [("paraphrase", prompt) for prompt in record.paraphrase_prompts]
    prompts += [("neighborhood", prompt) for prompt in record.neighborhood_prompts]
    objects = (fact.target_new, fact.target_true)
    found = scores(model, tokenizer, [(p, target) for _, p in prompts for target in objects])
    kinds = [kind for kind, _ in prompts]
    return list(zip(kinds, found[::2], found[1::2], strict=True))
