"""LayerMap: where the parts of any decoder-only transformers model are.

These are the results; ``models.finder`` finds them. Nothing knows a model class, nothing compares
shapes to guess an orientation. What the tree of modules does not tell is seen in one forward pass
over three tokens, when a model is mapped; the hooks are gone afterwards.

Shapes: B rows, T tokens, D model width, F MLP width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from goldenlayers.errors import UserError
from goldenlayers.models.offload import not_loaded, runs_on
from goldenlayers.models.quantised import stored_as
from goldenlayers.models.weights import not_a_number
from goldenlayers.shown import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PASSES_ON = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class LogitTransform:
    """What happens to the head's output: times ``scale``, then ``cap`` · tanh(logits / ``cap``)."""

    scale: float = 1.0
    cap: float | None = None
    says: str = ""

    def __call__(self, logits: Tensor) -> Tensor:
        """Final logits, of the head's output's shape (..., V)."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


@dataclass(frozen=True, eq=False)
class _Call:
    module: nn.Module
    given: Tensor | None
    returned: Tensor | None
    in_tuple: bool


@dataclass(frozen=True, eq=False)
class Trial:
    """What the pass showed. Calls are in the order in which they returned."""

    calls: tuple[_Call, ...]
    final_norm: nn.Module | None
    vocab_size: int
    transform: LogitTransform

    def order(self, module: nn.Module) -> int | None:
        """When ``module`` returned, counted from 0; None when it did not run."""
        return next((i for i, call in enumerate(self.calls) if call.module is module), None)

    def returns_tuple(self, module: nn.Module) -> bool:
        """Whether ``module`` handed on a tuple rather than a tensor."""
        return any(call.in_tuple for call in self.calls if call.module is module)

    def output_norm(self, block: nn.Module, down: nn.Module) -> nn.Module | None:
        """The module of ``block`` that is given the very tensor that ``down`` returned.

        Dropout, which passes the tensor on in eval mode, is looked through.
        """
        inside = set(block.modules())
        start = self.order(down)
        if start is None:
            return None
        flow = [self.calls[start].returned]
        for call in self.calls[start + 1 :]:
            if call.module not in inside or not any(call.given is t for t in flow):
                continue
            if isinstance(call.module, _PASSES_ON):
                flow.append(call.returned)
            else:
                return call.module
        return None


def run_trial(model: PreTrainedModel, blocks: Sequence[nn.Module], head: nn.Module) -> Trial:
    """Run ``model`` once, without gradients, and record every module's call.

    Raises:
        UserError: the pass fails, blocks do not run once each in order, the model is not causal,
            or its logits do not follow from the head's output by a scale and a soft cap.
    """
    name = type(model).__name__
    if not_loaded(model):
        raise UserError(f"the weights of {name} are not loaded", fix="Load the weights first")
    ids = _token_ids(model)
    calls: list[_Call] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        returned = _first(output)
        if module is head and returned is not None:
            returned = returned.clone()  # what scales the logits in place must not reach it
        given = _first((*args, *kwargs.values()))
        calls.append(_Call(module, given, returned, isinstance(output, tuple)))

    handles = [m.register_forward_hook(record, with_kwargs=True) for m in model.modules()]
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits  # (2, 3, V)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise UserError(
            f"{name} cannot run on three tokens: {error}", expected="a causal language model"
        ) from error
    finally:
        for handle in handles:
            handle.remove()

    at: dict[nn.Module, int] = {block: i for i, block in enumerate(blocks)}
    ran = [at[call.module] for call in calls if call.module in at]
    if ran != list(range(len(blocks))):
        raise UserError(
            f"the layers of {name} ran in the order {ran}",
            expected=f"each of the {len(blocks)} layers once, from first to last",
        )
    last = next(i for i, call in enumerate(calls) if call.module is blocks[-1])
    end = next((i for i, call in enumerate(calls) if call.module is head and i > last), None)
    if end is None:
        raise UserError(
            f"the head of {name} did not run after the last layer",
            fix="Give the path of the language-model head as the layer path 'head'",
        )
    scores = calls[end].returned
    if scores is None or scores.shape != logits.shape:
        raise UserError(f"the logits of {name} are not of its head's shape")
    norms = [
        call.module
        for call in calls[last + 1 : end]
        if not any(call.module.children())
        and not isinstance(call.module, _PASSES_ON)
        and all(parameter.dim() == 1 for parameter in call.module.parameters())
    ]
    if not bool(torch.isfinite(logits).all()):
        raise not_a_number(model, f"{name} predicts values that are not a number")
    if not _close(logits[0, :2], logits[1, :2]):
        raise UserError(
            f"{name} is not causal: its prediction at a token depends on later tokens",
            expected="a decoder-only language model",
        )
    return Trial(
        calls=tuple(calls),
        final_norm=norms[-1] if norms else None,
        vocab_size=logits.shape[-1],
        transform=_transform(model, scores.to(logits.device), logits),
    )


def _token_ids(model: PreTrainedModel) -> Tensor:
    """Two rows of three plain tokens (2, 3): none stands for an image, a sound or padding."""
    config = model.config
    text = config.get_text_config()
    special = {
        value
        for part in (config, text)
        for key, value in vars(part).items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    embedding = model.get_input_embeddings()
    size = int(embedding.weight.shape[0]) if isinstance(embedding, nn.Embedding) else 256
    plain = [i for i in range(min(size, 64)) if i not in special] or [0]
    a, b, c, d = (plain * 4)[:4]
    return torch.tensor([[a, b, c], [a, b, d]], device=runs_on(embedding))


def _first(values: Any) -> Tensor | None:
    some = values if isinstance(values, tuple | list) else (values,)
    return next((value for value in some if isinstance(value, Tensor)), None)


def _error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _close(a: Tensor, b: Tensor) -> bool:
    # Two rows of one batch may be rounded differently: in half precision that shows.
    tolerance = 0.1 if b.dtype in (torch.bfloat16, torch.float16) else 0.01
    return _error(a, b) <= tolerance * max(1.0, float(b.abs().max()))


def _transform(model: PreTrainedModel, scores: Tensor, logits: Tensor) -> LogitTransform:
    """The scale and cap, of those the config names, that turn ``scores`` into ``logits``.

    The same name means a factor in one family and a divisor in another, and a class may ignore
    what its config holds: so every reading is tried on the trial's own numbers.
    """
    config = model.config.get_text_config()
    scales = {"": 1.0}
    for key in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        value = getattr(config, key, None)
        if isinstance(value, int | float) and value not in (0, 1):
            scales |= {f"times {key} {value:g}": float(value)}
            scales |= {f"divided by {key} {value:g}": 1.0 / float(value)}
    cap = getattr(config, "final_logit_softcapping", None)
    caps = {f"soft cap {cap:g}": float(cap), "": None} if cap else {"": None}
    readings = [
        LogitTransform(scale, limit, ", ".join(word for word in (how, bound) if word))
        for how, scale in scales.items()
        for bound, limit in caps.items()
    ]
    best = min(readings, key=lambda reading: _error(reading(scores), logits))
    if not _close(best(scores), logits):
        raise UserError(
            f"the logits of {type(model).__name__} are not its head's output, nor that output "
            "scaled or capped as its config says",
            expected="a language model whose logits come from its head",
        )
    return best


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
        scopes = {
            "mlp": self.mlp_matrices,
            "down": (self.down,),
            "attention": self.attention_matrices,
            "block": self.attention_matrices + self.mlp_matrices + self.other_matrices,
        }
        if scope not in scopes:
            raise UserError(f"unknown scope '{scope}'", expected="one of " + ", ".join(SCOPES))
        return scopes[scope]


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
    plain = "(in, out)" if matrix.transposed else "(out, in)"
    stored = stored_as(matrix.module) or plain
    mark = "  <- down projection" if matrix is block.down else ""
    name = matrix.path.removeprefix(block.path + ".")
    return f"    {name:<32} {matrix.in_features} -> {matrix.out_features}  stored {stored}{mark}"


def _signature(block: Block) -> list[tuple[str, int, int, bool]]:
    return [
        (m.path.removeprefix(block.path + "."), m.in_features, m.out_features, m is block.down)
        for m in block.matrices("block")
    ]
