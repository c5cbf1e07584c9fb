"""LayerMap: where the parts of any decoder-only transformers model are.

These are the results; ``models.finder`` finds them. Nothing knows a model class, nothing compares
shapes to guess an orientation.

Shapes: B rows, T tokens, D model width, F MLP width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from goldenlayers.errors import UserError
from goldenlayers.models.trial import LogitTransform
from goldenlayers.shown import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCOPES = ("mlp", "down", "attention", "block")


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix of a block: y = x Wᵀ (+ b), with W of shape (out, in).

    ``transposed`` says that the weight is stored as (in, out), which transformers' Conv1D does. It
    follows from the module's type, never from its shape: a square matrix would not tell.
    """

    path: str
    module: nn.Module
    transposed: bool
    in_features: int
    out_features: int

    @property
    def parameter_name(self) -> str:
        """Name of the weight in the model's ``named_parameters()`` and ``state_dict()``."""
        return f"{self.path}.weight"

    @property
    def weight(self) -> nn.Parameter:
        """The weight as stored: (out, in), or (in, out) when ``transposed``."""
        return cast(nn.Parameter, self.module.weight)

    def oriented(self, stored: Tensor) -> Tensor:
        """A view of ``stored`` as (..., out, in); applied twice it gives back the stored layout."""
        return stored.transpose(-1, -2) if self.transposed else stored


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder layer and the matrices in it. ``down`` is the last of ``mlp_matrices``.

    ``mlp`` is None where the MLP's matrices sit in the block itself (OPT). ``mlp_output_norm`` is
    the norm that the MLP's output passes before it joins the residual stream (Gemma 2 and 3,
    OLMo 2, GLM-4), else None. ``other_matrices`` belong to neither attention nor MLP.
    ``returns_tuple`` tells what the block's forward hands on: a tuple that begins with the hidden
    state (GPT-J, BLOOM, Falcon, MPT), or the hidden state alone.
    """

    index: int
    path: str
    module: nn.Module
    mlp_matrices: tuple[Matrix, ...]
    down: Matrix
    attention_matrices: tuple[Matrix, ...]
    attention: nn.Module
    attention_path: str
    mlp: nn.Module | None
    mlp_path: str | None
    mlp_output_norm: nn.Module | None
    mlp_output_norm_path: str | None = None
    other_matrices: tuple[Matrix, ...] = ()
    returns_tuple: bool = False

    def matrices(self, scope: str) -> tuple[Matrix, ...]:
        """The matrices of a scope: ``mlp``, ``down``, ``attention``, or ``block`` for all."""
        if scope == "mlp":
            return self.mlp_matrices
        if scope == "down":
            return (self.down,)
        if scope == "attention":
            return self.attention_matrices
        if scope == "block":
            return self.attention_matrices + self.mlp_matrices + self.other_matrices
        raise UserError(f"unknown scope '{scope}'", expected="one of " + ", ".join(SCOPES))


@dataclass(frozen=True, eq=False)
class LayerMap:
    """The decoder blocks of a model, in the order they run, and what stands around them."""

    blocks: tuple[Block, ...]
    embedding: nn.Module
    embedding_path: str
    final_norm: nn.Module | None
    final_norm_path: str | None
    head: nn.Module
    head_path: str
    d_model: int
    d_mlp: int
    vocab_size: int
    transform: LogitTransform
    model_class: str = ""
    tied: bool = False

    @classmethod
    def of(cls, hf_model: PreTrainedModel, overrides: Mapping[str, str] | None = None) -> LayerMap:
        """Map ``hf_model``, which runs forward once on three tokens.

        Args:
            hf_model: a decoder-only language model with its head, in eval mode.
            overrides: module paths to use instead of those found; the keys are those of
                ``models.finder.OVERRIDES``.

        Raises:
            UserError: encoder-decoder, not causal, no decoder blocks, mixture of experts, a kind of
                layer whose orientation is unknown, a wrong override.

        """
        from goldenlayers.models.finder import find_layers  # it builds these classes

        return find_layers(hf_model, dict(overrides or {}))

    def __len__(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        """The blocks from first to last."""
        return iter(self.blocks)

    def __getitem__(self, index: int) -> Block:
        """Block ``index``, from the end if it is negative; UserError when there is none."""
        if not -len(self.blocks) <= index < len(self.blocks):
            raise UserError(
                f"there is no layer {index}",
                expected=f"a layer from 0 to {len(self.blocks) - 1}, or -1 for the last",
            )
        return self.blocks[index]

    def logits(self, hidden: Tensor) -> Tensor:
        """Final logits (..., V) from the head's input (..., D): head, then scale and soft cap."""
        return self.transform(self.head(hidden))

    def describe(self) -> str:
        """The map in words, one part a line: what was found, where, with which shapes."""
        first = self.blocks[0]
        norm = "none" if self.final_norm is None else self.final_norm_path
        tied = "tied to the embedding" if self.tied else "not tied to the embedding"
        lines = [
            f"{self.model_class}: {len(self)} decoder layers, model width {self.d_model}, "
            f"MLP width {self.d_mlp}, vocabulary {self.vocab_size}",
            f"  embedding   {self.embedding_path}",
            f"  final norm  {norm}",
            f"  head        {self.head_path} ({tied})",
        ]
        if self.transform.says:
            lines.append(f"  logits      {self.transform.says}")
        lines.append(f"layer 0  {first.path}")
        lines.append(f"  attention   {first.attention_path}")
        lines += [_matrix_line(first, matrix) for matrix in first.attention_matrices]
        lines.append(f"  MLP         {first.mlp_path or 'in the layer itself'}")
        lines += [_matrix_line(first, matrix) for matrix in first.mlp_matrices]
        if first.mlp_output_norm is not None:
            lines.append(f"  MLP output normalised by {first.mlp_output_norm_path}")
        if first.other_matrices:
            lines.append("  neither attention nor MLP:")
            lines += [_matrix_line(first, matrix) for matrix in first.other_matrices]
        unlike = [b.index for b in self.blocks if _signature(b) != _signature(first)]
        if unlike:
            lines.append("layers built unlike layer 0: " + ", ".join(map(str, unlike)))
        elif len(self) > 1:
            lines.append(f"layers 1 to {len(self) - 1} are built like layer 0")
        return "\n".join(map(shown, lines))


def _matrix_line(block: Block, matrix: Matrix) -> str:
    stored = "stored (in, out)" if matrix.transposed else "stored (out, in)"
    mark = "  <- down projection" if matrix is block.down else ""
    name = matrix.path.removeprefix(block.path + ".")
    return f"    {name:<32} {matrix.in_features} -> {matrix.out_features}  {stored}{mark}"


def _signature(block: Block) -> list[tuple[str, int, int, bool]]:
    return [
        (m.path.removeprefix(block.path + "."), m.in_features, m.out_features, m is block.down)
        for m in block.matrices("block")
    ]
