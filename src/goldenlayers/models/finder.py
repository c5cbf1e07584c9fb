"""Finds the parts of a decoder-only model by structure: the making of a LayerMap.

Module paths say where the decoder blocks and their attention are; one trial forward pass over three
tokens says the rest: which MLP matrix writes the MLP's output (the last to run), which norm it
passes through, which norm precedes the head, and what happens between the head and the logits.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from goldenlayers.errors import UserError, near_matches
from goldenlayers.models.layers import Block, LayerMap, Matrix, Trial, run_trial
from goldenlayers.models.offload import is_spread, tied_names
from goldenlayers.models.quantised import quantised_modules, stored_as

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

_ATTENTION = re.compile(r"(attn|attention)$")
_MLP = re.compile(r"(mlp|ffn|feed_?forward)$")
_EXPERTS = re.compile(r"^(\w+_)?experts?$|^router$")


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
            self._refuse_experts(f"{blocks_path}.{index}", module)
            self._attention_path(index, f"{blocks_path}.{index}", module)
        trial = run_trial(self.model, modules, head)
        blocks = tuple(
            self._block(index, f"{blocks_path}.{index}", module, trial)
            for index, module in enumerate(modules)
        )
        final_norm = trial.final_norm
        if "final_norm" in self.overrides:
            final_norm = self._at(self.overrides["final_norm"], "final_norm")
        weights = [getattr(part, "weight", None) for part in (embedding, head)]
        down = blocks[0].down
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
        if "blocks" in self.overrides:
            path = self.overrides["blocks"]
            found = self._at(path, "blocks")
            if not _is_list(found) or not any(found.children()):
                raise UserError(
                    f"layer path 'blocks': '{path}' is a {type(found).__name__}, not a list",
                    expected=OVERRIDES["blocks"],
                    fix=near_matches(path, [p for p, m in self.modules.items() if _is_list(m)]),
                )
            return path, list(found.children())
        lists = {
            path: list(module.children())
            for path, module in self.modules.items()
            if _is_list(module) and any(map(self._looks_like_block, module.children()))
        }
        above = embedding_path
        while lists and above:
            above = above.rpartition(".")[0]
            near = [p for p in lists if p.startswith(f"{above}." if above else "")]
            if near:
                best = max(near, key=lambda path: len(lists[path]))
                return best, lists[best]
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
        if len(names) != 1:
            what = f"{len(names)} attentions ({', '.join(names)})" if names else "no attention"
            raise UserError(
                f"layer {index} ('{path}') has {what}",
                expected="one attention in each layer",
                fix="If it has one, give its path in the layer as the layer path 'attention'",
            )
        self._at(names[0], "attention", below=path)
        return f"{path}.{names[0]}"

    def _refuse_experts(self, path: str, block: nn.Module) -> None:
        for name, module in block.named_modules():
            several = (
                isinstance(module, nn.ModuleList) and sum(map(_has_matrix, module.children())) > 1
            )
            stacked = not isinstance(module, nn.modules.conv._ConvNd) and any(
                parameter.dim() == 3 and min(parameter.shape) > 1
                for parameter in module.parameters(recurse=False)
            )
            if several or stacked or _EXPERTS.search(name.rpartition(".")[2]):
                raise UserError(
                    f"'{path}.{name}' in {self.name} makes it a mixture of experts, "
                    "which is not supported yet",
                    expected="a model with one MLP in each layer",
                )

    def _block(self, index: int, path: str, module: nn.Module, trial: Trial) -> Block:
        matrices = self._matrices(path, module)
        attention_path = self._attention_path(index, path, module)
        attention = self.modules[attention_path]
        ours = {id(m) for m in attention.modules()}
        attention_matrices = tuple(m for m in matrices if id(m.module) in ours)
        rest = [m for m in matrices if id(m.module) not in ours]
        mlp_path = self._mlp_path(path, rest)
        within = [m for m in rest if mlp_path == path or m.path.startswith(f"{mlp_path}.")]
        ran = [m for m in within if trial.order(m.module) is not None]
        if not ran:
            raise UserError(
                f"layer {index} ('{path}') has no MLP that runs",
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
            down = max(ran, key=lambda m: cast(int, trial.order(m.module)))
        norm = trial.output_norm(module, down.module)
        return Block(
            index=index,
            path=path,
            module=module,
            mlp_matrices=(*(m for m in within if m is not down), down),
            down=down,
            attention_matrices=attention_matrices,
            attention=attention,
            attention_path=attention_path,
            mlp=None if mlp_path == path else self.modules[mlp_path],
            mlp_path=None if mlp_path == path else mlp_path,
            mlp_output_norm=norm,
            mlp_output_norm_path=None if norm is None else self.paths[id(norm)],
            other_matrices=tuple(m for m in rest if m not in within),
            returns_tuple=trial.returns_tuple(module),
        )

    def _mlp_path(self, path: str, matrices: list[Matrix]) -> str:
        """The smallest module that holds all matrices outside attention, if only the block.

        Where they are spread over several children of the block of which one is named for an MLP,
        that one: the others (Gemma 4's per-layer inputs) are neither attention nor MLP.
        """
        if "mlp" in self.overrides:
            self._at(self.overrides["mlp"], "mlp", below=path)
            return f"{path}.{self.overrides['mlp']}"
        parents = zip(*(m.path.split(".")[:-1] for m in matrices), strict=False)
        shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, parents)]
        together = ".".join(shared) or path
        if together != path:
            return together
        named = [f"{path}.{n}" for n, _ in self.modules[path].named_children() if _MLP.search(n)]
        named = [p for p in named if any(m.path.startswith(f"{p}.") for m in matrices)]
        return named[0] if len(named) == 1 else path

    def _matrices(self, path: str, block: nn.Module) -> list[Matrix]:
        found = []
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
                raise UserError(
                    f"'{full}' is a {type(module).__name__} with the weight '{next(iter(own))}', "
                    "whose orientation is unknown",
                    expected="linear layers, torch.nn.Linear or transformers' Conv1D",
                )
        return found


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _has_matrix(module: nn.Module) -> bool:
    wide = any(parameter.dim() > 1 for parameter in module.parameters())
    return wide or bool(quantised_modules(module))
