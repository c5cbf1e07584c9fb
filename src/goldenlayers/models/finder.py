"""Finds the parts of a decoder-only model by structure: the making of a LayerMap.

Module paths say where the decoder blocks and their attention are; one trial forward pass over three
tokens says the rest: which MLP matrix writes the MLP's output (the last to run), which norm it
passes through, which norm precedes the head, and what happens between the head and the logits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from goldenlayers.errors import UserError, near_matches
from goldenlayers.models.experts import can_be_watched, switch_on
from goldenlayers.models.layers import Block, LayerMap, Matrix
from goldenlayers.models.mixture import MLP_NAME, last_to_run, mixture
from goldenlayers.models.offload import is_spread, tied_names
from goldenlayers.models.quantised import quantised_modules, stored_as
from goldenlayers.models.trial import Trial, run_trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OVERRIDES = {
    "blocks": "path of the list of decoder blocks",
    "mlp": "path of the MLP, relative to a block",
    "attention": "path of the attention, relative to a block",
    "down": "path of the down projection, relative to a block",
    "embedding": "path of the token embedding",
    "final_norm": "path of the norm before the head",
    "head": "path of the language-model head",
}

_LISTS = (nn.ModuleList, nn.Sequential)
_ATTENTION = re.compile(r"(attn|attention)$")


def find_layers(model: PreTrainedModel, overrides: dict[str, str]) -> LayerMap:
    """The map of ``model``: see ``LayerMap.of``, which calls this."""
    return _Finder(model, overrides).find()


class _Finder:
    """Finds the parts of one model. Paths first, then one trial pass, then the blocks."""

    def __init__(self, model: PreTrainedModel, overrides: dict[str, str]) -> None:
        self.model = model
        self.name = type(model).__name__
        self.overrides = overrides
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.paths = {id(module): path for path, module in self.modules.items()}
        for key in overrides:
            if key not in OVERRIDES:
                raise UserError(
                    f"unknown layer path '{key}'",
                    expected="one of " + ", ".join(OVERRIDES),
                    fix=near_matches(key, OVERRIDES),
                )

    def find(self) -> LayerMap:
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise UserError(
                f"{self.name} is an encoder-decoder model",
                expected="a decoder-only language model such as GPT-2, Llama or Gemma",
            )
        embedding = self._part("embedding", "get_input_embeddings")
        head = self._part("head", "get_output_embeddings")
        blocks_path, modules = self._blocks(self.paths[id(embedding)])
        for index, module in enumerate(modules):
            self._attention_path(index, f"{blocks_path}.{index}", module)
        switch_on([part for block in modules for part in block.modules() if can_be_watched(part)])
        trial = run_trial(self.model, modules, head)
        blocks = tuple(
            self._block(index, f"{blocks_path}.{index}", module, trial)
            for index, module in enumerate(modules)
        )
        self._refuse_shared(blocks)
        final_norm = trial.final_norm
        if "final_norm" in self.overrides:
            final_norm = self._at(self.overrides["final_norm"], "final_norm")
        weights = [getattr(part, "weight", None) for part in (embedding, head)]
        writing = [m for block in blocks for m in block.matrices("down")[-1:]]
        if not writing:
            raise UserError(
                f"{self.name} has no MLP in any of its {len(blocks)} layers",
                expected="a model with attention and an MLP in its layers",
            )
        down = writing[0]
        return LayerMap(
            blocks=blocks,
            embedding=embedding,
            embedding_path=self.paths[id(embedding)],
            final_norm=final_norm,
            final_norm_path=None if final_norm is None else self.paths[id(final_norm)],
            head=head,
            head_path=self.paths[id(head)],
            d_model=down.out_features,
            d_mlp=down.in_features,
            vocab_size=trial.vocab_size,
            model_class=self.name,
            tied=(weights[0] is not None and weights[0] is weights[1])
            or (
                is_spread(self.model) and f"{self.paths[id(head)]}.weight" in tied_names(self.model)
            ),
            transform=trial.transform,
        )

    def _refuse_shared(self, blocks: Sequence[Block]) -> None:
        """Refuse one MLP that runs in several layers: an edit of it would be one of all of them."""
        owners: dict[int, int] = {}
        for block in blocks:
            for matrix in block.mlp_matrices:
                held = matrix.module if matrix.experts else matrix.module.weight
                first = owners.setdefault(id(held), block.index)
                if first != block.index:
                    raise UserError(
                        f"layers {first} and {block.index} of {self.name} have one MLP in common "
                        f"('{matrix.path}')",
                        expected="an MLP of its own in each layer",
                    )

    def _at(self, path: str, key: str, *, below: str = "") -> nn.Module:
        """The module at an overriding ``path``; an error that lists near names if there is none."""
        full = f"{below}.{path}" if below else path
        if path and full in self.modules:
            return self.modules[full]
        prefix = f"{below}." if below else ""
        known = [p.removeprefix(prefix) for p in self.modules if p.startswith(prefix) and p]
        raise UserError(
            f"layer path '{key}': {self.name} has no module '{full}'",
            expected=OVERRIDES[key],
            fix=near_matches(path, known),
        )

    def _part(self, key: str, getter: str) -> nn.Module:
        if key in self.overrides:
            return self._at(self.overrides[key], key)
        try:
            module: Any = getattr(self.model, getter)()
        except NotImplementedError:
            module = None
        if not isinstance(module, nn.Module) or id(module) not in self.paths:
            raise UserError(
                f"{self.name} names no {'language-model head' if key == 'head' else key}",
                expected="a causal language model with its head",
                fix=f"Load the class for causal language modelling, or give the layer path '{key}'",
            )
        return module

    def _blocks(self, embedding_path: str) -> tuple[str, list[nn.Module]]:
        """The longest list of blocks nearest to the token embedding in the module tree.

        The embedding leads to the text decoder: a vision tower, however deep, is on another branch.
        """
        lists = {p: list(m.children()) for p, m in self.modules.items() if isinstance(m, _LISTS)}
        if (path := self.overrides.get("blocks")) is not None:
            found = self._at(path, "blocks")
            if not isinstance(found, _LISTS) or not any(found.children()):
                raise UserError(
                    f"layer path 'blocks': '{path}' is a {type(found).__name__}, not a list",
                    expected=OVERRIDES["blocks"],
                    fix=near_matches(path, list(lists)),
                )
            return path, list(found.children())
        with_attention = {
            path: children
            for path, children in lists.items()
            if any(map(self._looks_like_block, children))
        }
        # Of models that mix tokens in another way: a list of modules that each hold several parts.
        in_parts = {
            path: children
            for path, children in lists.items()
            if children and all(sum(map(_has_matrix, c.children())) > 0 for c in children)
        }
        for some in (with_attention, in_parts):
            above = embedding_path
            while some and above:
                above = above.rpartition(".")[0]
                near = [p for p in some if p.startswith(f"{above}." if above else "")]
                if near:
                    best = max(near, key=lambda path: len(some[path]))
                    return best, some[best]
        raise UserError(
            f"{self.name} has no decoder layers that hold attention and an MLP",
            expected="a decoder-only transformer",
            fix="If it has, give their list's module path as the layer path 'blocks'",
        )

    def _looks_like_block(self, module: nn.Module) -> bool:
        attention = self._attention_names(module)
        inside = [
            *(name for name, parameter in module.named_parameters() if parameter.dim() > 1),
            *(f"{name}." for name in quantised_modules(module)),
        ]
        return bool(attention) and any(not n.startswith(f"{attention[0]}.") for n in inside)

    def _attention_names(self, block: nn.Module) -> list[str]:
        """Paths in the block, at the least depth, that are named for attention and hold weights."""
        if "attention" in self.overrides:
            return [self.overrides["attention"]]
        names = [
            name
            for name, module in block.named_modules()
            if _ATTENTION.search(name) and _has_matrix(module)
        ]
        depth = min((name.count(".") for name in names), default=0)
        return [name for name in names if name.count(".") == depth]

    def _attention_path(self, index: int, path: str, block: nn.Module) -> str:
        names = self._attention_names(block)
        if not names:  # a layer that mixes tokens in another way, or not at all
            return ""
        if len(names) > 1:
            raise UserError(
                f"layer {index} ('{path}') has {len(names)} attentions ({', '.join(names)})",
                expected="one attention in each layer",
                fix="If it has one, give its path in the layer as the layer path 'attention'",
            )
        self._at(names[0], "attention", below=path)
        return f"{path}.{names[0]}"

    def _block(self, index: int, path: str, module: nn.Module, trial: Trial) -> Block:
        attention_path = self._attention_path(index, path, module)
        attention = self.modules[attention_path] if attention_path else None
        ours = set() if attention is None else {id(m) for m in attention.modules()}
        matrices, unknown = self._matrices(path, module)
        rest = [m for m in matrices if id(m.module) not in ours]
        block = Block(
            index=index,
            path=path,
            module=module,
            mlp_matrices=(),
            written=None,
            attention_matrices=tuple(m for m in matrices if id(m.module) in ours),
            mixer=attention,
            attention_path=attention_path,
            mlp=None,
            mlp_path=None,
            mlp_output_norm=None,
            other_matrices=tuple(rest),
            returns_tuple=trial.returns_tuple(module),
        )
        stacks = [p for p in self._below(path) if can_be_watched(self.modules[p])]
        if stacks:
            given = self.overrides.get("mlp")
            beside = given and self.paths[id(self._at(given, "mlp", below=path))]
            found = mixture(block, stacks, self.modules, trial, beside)
            ways = (1, found.n_experts)  # a router's
            for other in (p for p in unknown if p not in stacks and found.mlp_path):
                weights = [w for w in self.modules[other].parameters(recurse=False) if w.dim() > 1]
                if not all(w.dim() == 2 and w.shape[0] in ways for w in weights):
                    self._refuse_unknown(cast(str, found.mlp_path), {other: unknown[other]})
            return found
        unknown = {p: n for p, n in unknown.items() if id(self.modules[p]) not in ours}
        mlp_path = self._mlp_path(path, [*(m.path for m in rest), *unknown], attention, trial)
        if mlp_path is None:
            return block
        self._refuse_unknown(mlp_path, unknown)
        return self._with_mlp(block, mlp_path, trial)

    def _with_mlp(self, block: Block, mlp_path: str, trial: Trial) -> Block:
        """The block with the matrices below ``mlp_path``, and the one of them that runs last."""
        path, rest = block.path, block.other_matrices
        within = [m for m in rest if mlp_path == path or m.path.startswith(f"{mlp_path}.")]
        ran = [m for m in within if trial.order(m.module) is not None]
        if not ran:
            raise UserError(
                f"layer {block.index} ('{path}') has no MLP that runs",
                expected="attention and an MLP in each layer",
                fix="Give the path of the MLP in the layer as the layer path 'mlp'",
            )
        if "down" in self.overrides:
            wanted = self._at(self.overrides["down"], "down", below=path)
            chosen = [m for m in within if m.module is wanted]
            if not chosen:
                raise UserError(
                    f"layer path 'down': '{self.overrides['down']}' is no matrix of the MLP",
                    expected="one of " + ", ".join(m.path.removeprefix(f"{path}.") for m in within),
                )
            down = chosen[0]
        else:
            # The matrix that writes the MLP's output needs all the others' results: it runs last.
            down = cast(Matrix, last_to_run(ran, trial))
        norm = trial.output_norm(block.module, down.module)
        return replace(
            block,
            mlp_matrices=(*(m for m in within if m is not down), down),
            written=down,
            mlp=None if mlp_path == path else self.modules[mlp_path],
            mlp_path=None if mlp_path == path else mlp_path,
            mlp_output_norm=norm,
            mlp_output_norm_path=None if norm is None else self.paths[id(norm)],
            other_matrices=tuple(m for m in rest if m not in within),
        )

    def _below(self, path: str) -> list[str]:
        return [p for p in self.modules if p.startswith(f"{path}.")]

    def _refuse_unknown(self, mlp_path: str, unknown: Mapping[str, str]) -> None:
        """Refuse weights in the MLP whose use is not known."""
        for path, weight in unknown.items():
            if path != mlp_path and not path.startswith(f"{mlp_path}."):
                continue
            module = self.modules[path]
            stacks = [p for p in module.parameters(recurse=False) if p.dim() == 3]
            if any(min(p.shape) > 1 for p in stacks):
                raise UserError(
                    f"'{path}' in {self.name} ({type(module).__name__}) holds matrices stacked in "
                    "one weight, run by code of its own: the tokens of each cannot be told apart",
                    expected="an ordinary MLP, or experts that transformers runs by its interface "
                    "for experts, as Mixtral's",
                )
            raise UserError(
                f"'{path}' is a {type(module).__name__} with the weight '{weight}', "
                "whose orientation is unknown",
                expected="linear layers, torch.nn.Linear or transformers' Conv1D",
            )
        several = [
            path
            for path in [mlp_path, *self._below(mlp_path)]
            if isinstance(self.modules[path], nn.ModuleList)
            and sum(map(_has_matrix, self.modules[path].children())) > 1
        ]
        if several:
            raise UserError(
                f"'{several[0]}' in {self.name} holds several MLPs or experts, each with tokens of "
                "its own that cannot be told apart",
                expected="an ordinary MLP, or experts that transformers runs by its interface for "
                "experts, as Mixtral's",
            )

    def _mlp_path(
        self, path: str, matrices: list[str], attention: nn.Module | None, trial: Trial
    ) -> str | None:
        """The smallest module that holds all matrices outside attention, if only the block; None
        where the block has no MLP.

        Where they are spread over several children of the block of which one is named for an MLP,
        that one: the others (Gemma 4's per-layer inputs, a state space beside the attention) are
        neither attention nor MLP. In a block without attention, a child that works on each token by
        itself is the MLP, and what mixes tokens is not.
        """
        if "mlp" in self.overrides:
            self._at(self.overrides["mlp"], "mlp", below=path)
            return f"{path}.{self.overrides['mlp']}"
        parents = zip(*(p.split(".")[:-1] for p in matrices), strict=False)
        shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, parents)]
        together = ".".join(shared) or path
        if attention is not None and together != path:
            return together
        holding = [
            full
            for name, _ in self.modules[path].named_children()
            if any(f"{p}.".startswith(f"{(full := f'{path}.{name}')}.") for p in matrices)
        ]
        named = [full for full in holding if MLP_NAME.search(full)]
        if len(named) == 1:
            return named[0]
        nested = [p for p in self._below(path) if MLP_NAME.search(p) and p not in holding]
        nested = [p for p in nested if any(m.startswith(f"{p}.") for m in matrices)]
        depth = min((p.count(".") for p in nested), default=0)
        if len(named := [p for p in nested if p.count(".") == depth]) == 1:
            return named[0]
        if attention is not None:
            return path
        by_token = [full for full in holding if trial.works_by_token(self.modules[full])]
        return by_token[0] if len(by_token) == 1 else None

    def _matrices(self, path: str, block: nn.Module) -> tuple[list[Matrix], dict[str, str]]:
        """The block's linear maps; and, by module path, the name of another weight of two or more
        dimensions that a module holds.
        """
        found: list[Matrix] = []
        unknown: dict[str, str] = {}
        for name, module in block.named_modules():
            own = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() > 1}
            full = f"{path}.{name}" if name else path
            features = [getattr(module, key, None) for key in ("in_features", "out_features")]
            if isinstance(module, Conv1D):
                found.append(Matrix(full, module, True, module.nx, module.nf))
            elif isinstance(module, nn.Linear) or (
                all(isinstance(size, int) for size in features)
                and (hasattr(module, "weight") or stored_as(module))
            ):
                # Quantised linear layers of other libraries state their features the same way.
                found.append(Matrix(full, module, False, *cast(list[int], features)))
            elif own and not isinstance(module, nn.Embedding):
                unknown[full] = next(iter(own))
        return found, unknown


def _has_matrix(module: nn.Module) -> bool:
    wide = any(parameter.dim() > 1 for parameter in module.parameters())
    return wide or bool(quantised_modules(module))
