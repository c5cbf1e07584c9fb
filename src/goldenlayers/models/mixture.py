"""A layer with experts: what of it is routed, what is shared, and what decides where tokens go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import nn

from goldenlayers.errors import UserError
from goldenlayers.models.experts import taps_of
from goldenlayers.models.layers import Block, Matrix
from goldenlayers.models.trial import Trial

MLP_NAME = re.compile(r"(mlp|ffn|feed_?forward)$")


def last_to_run(matrices: Sequence[Matrix], trial: Trial) -> Matrix | None:
    """The one of some matrices that ran last; None if none ran."""
    ran = [m for m in matrices if trial.order(m.module) is not None]
    return max(ran, key=lambda m: cast(int, trial.order(m.module))) if ran else None


def mixture(
    block: Block,
    stacks: Sequence[str],
    modules: Mapping[str, nn.Module],
    trial: Trial,
    beside: str | None = None,
) -> Block:
    """The block with its experts, and with the expert that all tokens pass if there is one.

    What lies beside the experts and has a way in and a way out of the model's width is shared
    (a shared expert, or an MLP that runs beside them); what ends in one number for each expert
    decides where tokens go.

    Args:
        block: with everything outside attention in ``other_matrices``.
        stacks: paths of the modules that hold stacked experts.
        modules: all modules of the model by path.
        trial: a pass of the model.
        beside: path of the shared MLP, where the user names it.

    Raises:
        UserError: several stacks of experts, or several MLPs beside them.
    """
    if len(stacks) > 1:
        raise UserError(
            f"layer {block.index} ('{block.path}') has {len(stacks)} stacks of experts "
            f"({', '.join(stacks)})",
            expected="one in a layer",
        )
    taps = taps_of(modules[stacks[0]])
    path, width = stacks[0].rpartition(".")[0], taps.down.out_features
    stacked = [
        Matrix(
            f"{stacks[0]}.{tap.name}",
            tap,
            tap.transposed,
            tap.in_features,
            tap.out_features,
            tap.experts,
        )
        for tap in (taps.up, taps.down)
    ]
    groups: dict[str, list[Matrix]] = {}
    for matrix in block.other_matrices:
        below = path if matrix.path.startswith(f"{path}.") else block.path
        child = matrix.path.removeprefix(f"{below}.").split(".")[0]
        groups.setdefault(f"{below}.{child}", []).append(matrix)

    def is_shared(name: str) -> bool:
        if beside is not None:
            return name == beside
        last = last_to_run(groups[name], trial)
        ways = last is not None and last.out_features == width
        return ways and any(m.in_features == width and m is not last for m in groups[name])

    found = [name for name in groups if is_shared(name)]
    # Norms may have matrices of their own: what lies beside the experts, or is so named, first.
    near = [name for name in found if name.startswith(f"{path}.") or MLP_NAME.search(name)]
    shared = near or [name for name in found if trial.works_by_token(modules[name])]
    if len(shared) > 1:
        raise UserError(
            f"layer {block.index} ('{block.path}') has {len(shared)} MLPs beside its experts "
            f"({', '.join(shared)})",
            expected="one that all tokens pass, or none",
            fix="Give the path of one of them in the layer as the layer path 'mlp'",
        )
    own = groups[shared[0]] if shared else []
    last = last_to_run(own, trial)
    routers = {
        id(m)
        for some in groups.values()
        for m in some
        if cast(Matrix, last_to_run(some, trial) or some[-1]).out_features in (1, taps.n_experts)
    }
    return replace(
        block,
        mlp_matrices=(*stacked, *(m for m in own if m is not last), *([last] if last else [])),
        written=last,
        routed=taps,
        mlp=None if path == block.path else modules[path],
        mlp_path=None if path == block.path else path,
        other_matrices=tuple(
            m for m in block.other_matrices if m not in own and id(m) not in routers
        ),
    )
