"""MEND's hypernetwork: rank-one factors of a gradient in, rank-one factors of an update out.

Mitchell et al. (2021), section 3: one network for each shape of weight matrix, shared by all
matrices of that shape, each of which has its own scale and shift.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memit.files.reading import holding
from memit.files.tensors import load_tensors, save_tensors
from memit.weight_delta import LowRank

SMALLEST_DEVIATION = 1e-7
"""Added to standard deviations that are divided by."""


@dataclass(frozen=True)
class Factors:
    """The gradient of a matrix as a sum of rank-one terms: Σ output inputᵀ."""

    input: Tensor
    """What entered the matrix (k × inputs)."""
    output: Tensor
    """The loss's gradient in what left it (k × outputs)."""


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that MEND changes."""

    inputs: int
    outputs: int


class MendNetwork(nn.Module):
    """The trained part of MEND for some matrices of one model."""

    def __init__(
        self,
        matrices: Mapping[str, Matrix],
        *,
        rank: int,
        edit_learning_rate: float,
        seed: int = 0,
        origin: Mapping[str, Any] | None = None,
    ):
        """A network that is the identity: its update is a plain gradient step.

        Args:
            matrices: by the names of the weights.
            rank: of the network's own matrices; capped by their size.
            edit_learning_rate: initial step size of each matrix.
            seed: of the initial weights.
            origin: what it is trained on and how.
        """
        super().__init__()
        self.matrices = dict(matrices)
        self.rank = rank
        self.origin = dict(origin or {})
        """Model, settings and training facts; written into the file."""
        names: dict[str, list[str]] = {}
        for name, matrix in matrices.items():
            names.setdefault(f"{matrix.inputs}x{matrix.outputs}", []).append(name)
        self.places = {name: (shape, i) for shape, of in names.items() for i, name in enumerate(of)}
        """The network of each matrix, and its row among those that share it."""
        generator = torch.Generator().manual_seed(seed)
        shared = {
            shape: _SharedNetwork(matrices[of[0]], len(of), rank, generator)
            for shape, of in names.items()
        }
        self.networks = nn.ModuleDict(shared)
        start = torch.full((len(matrices),), edit_learning_rate)
        self.log_rates = nn.Parameter(start.log())
        """Logarithm of each matrix's step size, in the order of `matrices`."""

    def update(self, name: str, factors: Factors) -> LowRank:
        """The change of a matrix (outputs × inputs): minus its step size times the gradient whose
        factors were mapped."""
        shape, row = self.places[name]
        x, delta = self.networks[shape](factors.input, factors.output, row)
        rate = self.log_rates[list(self.matrices).index(name)].exp()
        return LowRank(-rate * delta.T, x.T)

    @torch.no_grad()
    def normalise(self, name: str, factors: Sequence[Factors]) -> None:
        """Take mean and deviation of a matrix's factors, by which its inputs are normalised."""
        shape, row = self.places[name]
        joined = torch.cat([torch.cat([part.input, part.output], 1) for part in factors])
        network = self.networks[shape]
        assert isinstance(network, _SharedNetwork)
        network.mean[row] = joined.mean(0)
        network.deviation[row] = joined.std(0, correction=0)

    def save(self, path: Path) -> None:
        """Write weights and origin as safetensors."""
        described = {
            "matrices": {n: [m.inputs, m.outputs] for n, m in self.matrices.items()},
            "rank": self.rank,
            "origin": self.origin,
        }
        save_tensors(self.state_dict(), path, {"mend": json.dumps(described, sort_keys=True)})

    @staticmethod
    def load(path: Path) -> MendNetwork:
        """Read what `save` wrote; raises `IntegrityError` for anything else."""
        with holding(path, "a network of MEND", "train or fetch it again"):
            tensors, metadata = load_tensors(path)
            described = json.loads(metadata["mend"])
            network = MendNetwork(
                {name: Matrix(*sizes) for name, sizes in described["matrices"].items()},
                rank=described["rank"],
                edit_learning_rate=1.0,
                origin=described["origin"],
            )
            network.load_state_dict(tensors)
            return network


class _SharedNetwork(nn.Module):
    """Two low-rank layers around the identity, for all matrices of one shape."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, matrix: Matrix, count: int, rank: int, generator: torch.Generator):
        super().__init__()
        size = matrix.inputs + matrix.outputs
        self.inputs = matrix.inputs
        self.hidden = _LowRankLayer(size, count, rank, generator)
        self.last = _LowRankLayer(size, count, rank, generator)
        self.register_buffer("mean", torch.zeros(count, size))
        self.register_buffer("deviation", torch.ones(count, size))

    def forward(self, x: Tensor, delta: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """Mapped factors of the matrix `row`: what the layers add to the normalised ones, added to
        the factors themselves in their own units."""
        joined = torch.cat([x, delta], 1)
        deviation = self.deviation[row]
        z = (joined - self.mean[row]) / (deviation + SMALLEST_DEVIATION)
        # Unlike relu, clamp has a gradient at 0, where an untrained layer starts.
        added = self.hidden(z, row).clamp(min=0)
        added = added + self.last(z + added, row)
        mapped = joined + deviation * added
        return mapped[:, : self.inputs], mapped[:, self.inputs :]


class _LowRankLayer(nn.Module):
    """scale ⊙ (U V z + bias) + shift, with a scale and a shift for each matrix; 0 at first."""

    def __init__(self, size: int, count: int, rank: int, generator: torch.Generator):
        super().__init__()
        rank = min(rank, size)
        self.u = nn.Parameter(torch.zeros(size, rank))
        self.v = nn.Parameter(torch.randn(rank, size, generator=generator) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(count, size))
        self.shift = nn.Parameter(torch.zeros(count, size))

    def forward(self, z: Tensor, row: int) -> Tensor:
        """k × size to k × size."""
        return self.scale[row] * (z @ self.v.T @ self.u.T + self.bias) + self.shift[row]
