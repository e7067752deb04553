"""SERAC's scope classifier: whether a prompt asks for an edit, by the distance of two embeddings.

Mitchell et al. (2022), section 3.1, the variant that embeds: a memory of n edits costs one encoding
of each edit when it is written and one of the prompt when it is read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from memit.batches import run_in_batches
from memit.errors import UnreachableError
from memit.forward.passes import pad


class ScopeClassifier(nn.Module):
    """An encoder, and the logit of "in scope", which falls with the distance of embeddings."""

    def __init__(self, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        """A classifier before its training."""
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.log_scale = nn.Parameter(torch.zeros(()))
        """Logarithm of the logit's slope in the squared distance."""
        self.bias = nn.Parameter(torch.ones(()))
        """The logit at distance 0."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Mean of the encoder's last hidden states over each text's tokens, of unit mean square
        (texts × hidden size)."""
        longest = int(getattr(self.encoder.config, "max_position_embeddings", None) or 512)
        rows = [ids[:longest] for ids in self.tokenizer(list(texts))["input_ids"]]
        padded = pad(rows, self.bias.device)
        encoded = self.encoder(input_ids=padded.ids, attention_mask=padded.mask)
        hidden = encoded.last_hidden_state
        summed = (hidden * padded.mask[:, :, None]).sum(1)
        return nn.functional.normalize(summed, dim=1) * hidden.shape[-1] ** 0.5

    def logits(self, prompts: Tensor, edits: Tensor) -> Tensor:
        """Logit that each prompt is in the scope of each edit (prompts × edits); embeddings in."""
        squared = torch.cdist(prompts, edits).square()
        return self.bias - self.log_scale.exp() * squared / prompts.shape[1] ** 0.5

    @torch.no_grad()
    def embed_all(self, texts: Sequence[str], token_budget: int) -> Tensor:
        """Embeddings of any number of texts, a batch at a time (texts × hidden size)."""
        batches = run_in_batches(texts, lambda t: (1, len(t) // 2 + 1), token_budget, self.embed)
        parts = [part for _, part in batches]
        return torch.cat(parts) if parts else torch.zeros(0, self.encoder.config.hidden_size)


def new_encoder(
    tokenizer: PreTrainedTokenizerBase, *, width: int, layers: int, seed: int
) -> PreTrainedModel:
    """An untrained encoder for a tokenizer; the global generator is left as it was."""
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        dim=width,
        hidden_dim=4 * width,
        n_layers=layers,
        n_heads=max(1, width // 32),
        dropout=0.0,
        attention_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DistilBertModel(config).float()


def load_encoder(
    name: str, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained encoder and its tokenizer from the hub or a directory.

    Raises:
        UnreachableError: they cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        encoder = AutoModel.from_pretrained(
            name,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnreachableError(
            f"the encoder {name} could not be loaded ({reason}); check its name and the network, "
            "or leave it out to train one from scratch."
        ) from error
    return encoder, tokenizer
