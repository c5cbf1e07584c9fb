"""LayerMap: where the parts of any decoder-only transformers model are.

These are the results; ``models.finder`` finds them. Nothing knows a model class, nothing compares
shapes to guess an orientation. What the tree of modules does not tell is seen in one forward pass
over three tokens (``models.trial``), when a model is mapped.

Shapes: D model width, F MLP width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from goldenlayers.errors import UserError
from goldenlayers.models.quantised import stored_as
from goldenlayers.models.trial import LogitTransform
from goldenlayers.shown import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from goldenlayers.models.experts import Taps

SCOPES = ("mlp", "down", "attention", "block")


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight matrix of a block: y = x Wᵀ (+ b), with W of shape (out, in).

    ``transposed`` says that the weight is stored as (in, out), which transformers' Conv1D does. It
    follows from the module's type, never from its shape: a square matrix would not tell.
    ``experts`` is 0; or the matrix is that of so many experts, stacked (experts, out, in), and
    ``module`` a tap (see :mod:`goldenlayers.models.experts`) whose rows are slots: each token as
    often as it has experts.
    """

    path: str
    module: nn.Module
    transposed: bool
    in_features: int
    out_features: int
    experts: int = 0

    @property
    def parameter_name(self) -> str:
        """Name of the weight in ``named_parameters()``; what a delta calls it.

        The matrix of one expert is a slice of such a weight: EXPERTS.3.down_proj.weight.
        """
        return self.path if self.experts else f"{self.path}.weight"

    @property
    def of_expert(self) -> bool:
        """Whether it is the matrix of one expert; which tokens see it, ``module.routed`` tells."""
        return getattr(self.module, "expert", None) is not None

    @property
    def size(self) -> int:
        """How many weights it has."""
        return self.in_features * self.out_features * max(1, self.experts)

    @property
    def weight(self) -> nn.Parameter:
        """The weight as stored: (out, in), or (in, out) when ``transposed``."""
        return cast(nn.Parameter, self.module.weight)

    def oriented(self, stored: Tensor) -> Tensor:
        """A view of ``stored`` as (..., out, in); applied twice it gives back the stored layout."""
        return stored.transpose(-1, -2) if self.transposed else stored


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder layer and the matrices in it.

    ``written`` is the matrix that an edit changes, the one that writes the MLP's output: of a
    mixture of experts the shared expert's. It is None where there is no such matrix, in which case
    ``routed`` holds the taps of the experts, or there is no MLP at all.

    ``mixer`` is the attention; None in layers that mix tokens in another way (state space,
    convolution) or not at all.

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
    written: Matrix | None
    attention_matrices: tuple[Matrix, ...]
    mixer: nn.Module | None
    attention_path: str
    mlp: nn.Module | None
    mlp_path: str | None
    mlp_output_norm: nn.Module | None
    mlp_output_norm_path: str | None = None
    other_matrices: tuple[Matrix, ...] = ()
    returns_tuple: bool = False
    routed: Taps | None = None

    @property
    def attention(self) -> nn.Module:
        """The attention.

        Raises:
            UserError: the layer has none.
        """
        if self.mixer is None:
            raise UserError(f"layer {self.index} ('{self.path}') has no attention")
        return self.mixer

    @property
    def down(self) -> Matrix:
        """The matrix that an edit changes; the last of ``mlp_matrices`` unless an override says so.

        Raises:
            UserError: the layer has no MLP, or every token has its own experts and there is none
                that all tokens pass.
        """
        if not self.mlp_matrices:
            raise UserError(
                f"layer {self.index} ('{self.path}') has no MLP, so nothing can be edited there",
                fix="Choose one of the other layers (golden models --inspect)",
            )
        if self.written is None:
            raise UserError(
                f"layer {self.index} has {self.n_experts} experts and none that every token "
                "passes: what was asked needs one matrix for all tokens",
                fix="Use a layer with a shared expert or an ordinary MLP, if the model has one "
                "(golden models --inspect), lga to choose a layer, or rome to edit",
            )
        return self.written

    @property
    def mlp_writer(self) -> nn.Module:
        """The module whose output is the MLP's: of a mixture the sum of its experts.

        Raises:
            UserError: experts run beside an MLP, and no module gives their sum.
        """
        if self.routed is None:
            return self.down.module
        if self.mlp is None:
            raise UserError(
                f"layer {self.index} adds up its experts and its MLP outside of any module",
                fix="Use --kind block",
            )
        return self.mlp

    @property
    def n_experts(self) -> int:
        """Experts that tokens are routed to; 0 in an ordinary layer."""
        return 0 if self.routed is None else self.routed.n_experts

    @property
    def experts_path(self) -> str:
        """Module path of the routed experts."""
        return next(m.path.rpartition(".")[0] for m in self.mlp_matrices if m.experts)

    def through(self, expert: int) -> Block:
        """The same layer with an expert's down projection as the matrix that an edit changes."""
        assert self.routed is not None
        tap = self.routed.one(expert)
        path = f"{self.experts_path}.{expert}.{tap.name}"
        one = Matrix(path, tap, tap.transposed, tap.in_features, tap.out_features)
        return replace(self, written=one)

    @property
    def edited_name(self) -> str | None:
        """The weight that an edit changes; * where the fact chooses the expert; None for none."""
        if self.routed is not None and self.written is None:
            return f"{self.experts_path}.*.{self.routed.down.name}.weight"
        return None if self.written is None else self.written.parameter_name

    @property
    def editable_names(self) -> list[str]:
        """Names of all weights that a delta may change here."""
        found = [m.parameter_name for m in self.matrices("block") if not m.experts]
        if self.routed is not None:
            name = self.routed.down.name
            found += [f"{self.experts_path}.{e}.{name}.weight" for e in range(self.n_experts)]
        return found

    def matrices(self, scope: str) -> tuple[Matrix, ...]:
        """The matrices of a scope: ``mlp``, ``down``, ``attention``, or ``block`` for all."""
        scopes = {
            "mlp": self.mlp_matrices,
            "down": self._down_scope,
            "attention": self.attention_matrices,
            "block": self.attention_matrices + self.mlp_matrices + self.other_matrices,
        }
        if scope not in scopes:
            raise UserError(f"unknown scope '{scope}'", expected="one of " + ", ".join(SCOPES))
        return scopes[scope]

    @property
    def _down_scope(self) -> tuple[Matrix, ...]:
        """What writes the MLP's output: of a mixture, the experts' matrix and the shared one's."""
        stacked = tuple(m for m in self.mlp_matrices if m.experts and m.path.endswith("down_proj"))
        return stacked + (() if self.written is None else (self.written,))


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
        """Final logits (..., V) from the head's input (..., D), and on its device."""
        return self.transform(self.head(hidden)).to(hidden.device)

    def describe(self) -> str:
        """The map in words, one part a line: what was found, where, with which shapes."""
        first = next((block for block in self.blocks if block.mlp_matrices), self.blocks[0])
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
        lines += _layer_lines(first)
        unlike = [b for b in self.blocks if b.mlp_matrices and _signature(b) != _signature(first)]
        if unlike:
            lines.append(
                f"layers built unlike layer {first.index}: "
                + ", ".join(str(block.index) for block in unlike)
            )
        elif len(self) > 1 and not self.without_mlp:
            lines.append(f"layers 1 to {len(self) - 1} are built like layer 0")
        mixture = next((block for block in unlike if block.routed is not None), None)
        if mixture is not None and first.routed is None:
            lines += _layer_lines(mixture)
        if bare := self.without_mlp:
            lines.append(
                "layers without an MLP, neither ranked nor edited: " + ", ".join(map(str, bare))
            )
        return "\n".join(map(shown, lines))

    @property
    def with_mlp(self) -> list[int]:
        """Layers that have an MLP: those that can be ranked and edited."""
        return [block.index for block in self.blocks if block.mlp_matrices]

    def nearest(self, layer: int) -> int:
        """The layer with an MLP that is nearest to one; of two the earlier."""
        return min(self.with_mlp, key=lambda one: (abs(one - layer), one))

    @property
    def without_mlp(self) -> list[int]:
        """Layers that have no MLP, and so take no part."""
        return [block.index for block in self.blocks if not block.mlp_matrices]


def _layer_lines(block: Block) -> list[str]:
    lines = [f"layer {block.index}  {block.path}"]
    lines.append(f"  attention   {block.attention_path or 'none'}")
    lines += [_matrix_line(block, matrix) for matrix in block.attention_matrices]
    lines.append(f"  MLP         {block.mlp_path or 'in the layer itself'}")
    lines += [_matrix_line(block, matrix) for matrix in block.mlp_matrices]
    if block.routed is not None:
        lines.append(f"  {block.n_experts} experts, {block.routed.per_token} for each token")
        lines.append(f"  an edit changes {_edited(block)}")
    if block.mlp_output_norm is not None:
        lines.append(f"  MLP output normalised by {block.mlp_output_norm_path}")
    if block.other_matrices:
        lines.append("  neither attention nor MLP:")
        lines += [_matrix_line(block, matrix) for matrix in block.other_matrices]
    return lines


def _edited(block: Block) -> str:
    if block.written is not None:
        return "the shared expert, which every token passes"
    return "the expert that weighs most at the subject's last token"


def _matrix_line(block: Block, matrix: Matrix) -> str:
    plain = "(in, out)" if matrix.transposed else "(out, in)"
    stored = stored_as(matrix.module) or plain
    mark = "  <- down projection" if matrix is block.written else ""
    if matrix.experts:
        stored = f"({matrix.experts} experts, {stored[1:]}"
    name = matrix.path.removeprefix(block.path + ".")
    return f"    {name:<32} {matrix.in_features} -> {matrix.out_features}  stored {stored}{mark}"


def _signature(block: Block) -> list[tuple[str, int, int, bool]]:
    return [
        (m.path.removeprefix(block.path + "."), m.in_features, m.out_features, m is block.written)
        for m in block.matrices("block")
    ]
