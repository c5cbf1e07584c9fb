"""Models spread over devices, here over CPU memory and disk: everything as on one device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save, tiny
from torch import Tensor

import goldenlayers as gl
from goldenlayers.decoding import greedy
from goldenlayers.delta import Dense, LowRank, WeightDelta
from goldenlayers.delta.apply import base_weight
from goldenlayers.delta.targets import find_targets
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact, Probe
from goldenlayers.models import Model, offload

SAMPLE = ("gpt2", "gemma3")  # what each family has of its own is in its forward pass
FACTS = [
    Fact(
        subject,
        prompt=f"The capital of {subject} is",
        target="Rome",
        target_old="Paris",
        rephrasings=(f"They visit {subject}, whose capital is",),
        locality=(Probe("The capital of Spain is", "Madrid"),),
        id=subject,
    )
    for subject in ("France", "Italy")
]


def pair(family: str, folder: Path, share: float = 0.5) -> tuple[Model, Model]:
    """A tiny model in memory, and the same with a share of it in memory and the rest on disk."""
    save(made := tiny(family), folder)
    size = sum(p.numel() * p.element_size() for p in made.hf.parameters())
    spread = gl.load(
        folder, device="auto", max_memory={"cpu": int(share * size)}, cache_dir=folder / "cache"
    )
    assert offload.is_spread(spread.hf)
    assert offload.places(spread.hf)["disk"] > (1 - share) * size
    return gl.load(folder), spread


def all_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_every_family_is_spread_and_edited(family: str, tmp_path: Path) -> None:
    plain, spread = pair(family, tmp_path)
    assert spread.layers.describe() == plain.layers.describe()
    assert spread.fingerprint() == plain.fingerprint()
    ids = torch.tensor([[5, 6, 7, 8]])
    clean = plain.hf(ids).logits
    assert torch.equal(spread.hf(ids).logits, clean)
    down = plain.layers[2].down
    factors = torch.randn(down.out_features, 1), torch.randn(down.in_features, 1)
    delta = WeightDelta({down.parameter_name: LowRank(*factors)}, plain.fingerprint())
    with delta.applied(plain), delta.applied(spread):
        edited = plain.hf(ids).logits
        assert torch.equal(spread.hf(ids).logits, edited)
        assert not torch.equal(edited, clean)
    assert torch.equal(spread.hf(ids).logits, clean)
    assert all_equal(dict(offload.named_values(spread.hf)), dict(offload.named_values(plain.hf)))


@pytest.mark.parametrize("name", SAMPLE)
def test_locate_edit_ask_and_evaluate_are_the_same(name: str, tmp_path: Path) -> None:
    found = []
    for model in pair(name, tmp_path):
        rankings = [gl.locate(model, FACTS, "lga", bootstrap=0)]
        rankings.append(gl.locate(model, FACTS, "cma", bootstrap=0, samples=2, known=False))
        statistics = gl.key_statistics(model, [2], tokens=256, cache=False)
        row: list[object] = [[layer.score for layer in r.layers] for r in rankings]
        row.append(statistics[2].moment.tolist())
        for editor, settings in (("clear-rome", {"neighbours": 4}), ("memit", {}), ("ft-m", {})):
            more: dict[str, Any] = {"steps": 2, **settings}
            if editor != "ft-m":
                more |= {"prefixes": 1, "statistics": statistics}
            delta = gl.edit(model, FACTS[:1], editor, layer=2, **more)
            row += [delta.dense(n).tolist() for n in delta.changes]
            row.append(delta.norms(model))
            with delta.applied(model):
                scores = gl.evaluate(model, FACTS)
                row += list(scores.rows)
                row.append(greedy(model, [[5, 6, 7]], 4))
        found.append(row)
    assert found[0] == found[1]


def test_deltas_nest_and_undo_where_weights_are_on_disk(tmp_path: Path) -> None:
    plain, spread = pair("llama", tmp_path)
    name = plain.layers[3].down.parameter_name
    shape = plain.layers[3].down.out_features, plain.layers[3].down.in_features
    dense = WeightDelta({name: Dense(torch.randn(shape))}, plain.fingerprint())
    low = WeightDelta(
        {name: LowRank(torch.randn(shape[0], 2), torch.randn(shape[1], 2))}, plain.fingerprint()
    )
    target = find_targets(spread.hf, low.changes)[name]
    stored = target.now()
    for model in (plain, spread):
        with dense.applied(model), low.applied(model), dense.applied(model):
            pass
    with dense.applied(plain), low.applied(plain), dense.applied(spread), low.applied(spread):
        held = [find_targets(m.hf, low.changes)[name] for m in (plain, spread)]
        assert torch.equal(*(one.weight(one.now()) for one in held))
        assert torch.equal(base_weight(spread.hf, target), stored["weight"])
    assert target.now() is stored
    low.merge(spread)
    low.merge(plain)
    assert spread.fingerprint() == plain.fingerprint()


class Counted(Mapping[str, Tensor]):
    """Weights that are read, and how many bytes of them are held at once."""

    held = most = 0

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values_of = values

    def __getitem__(self, name: str) -> Tensor:
        found = self.values_of[name].clone()
        size = found.untyped_storage().nbytes()
        Counted.held += size
        Counted.most = max(Counted.most, Counted.held)
        weakref.finalize(found.untyped_storage(), Counted._gone, size)
        return found

    @staticmethod
    def _gone(size: int) -> None:
        Counted.held -= size

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_of)

    def __len__(self) -> int:
        return len(self.values_of)


@pytest.mark.parametrize("again", [True, False])
def test_gradients_do_not_hold_the_weights(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, spread = pair("llama", tmp_path, 0.3)
    monkeypatch.setattr(Counted, "held", 0)
    monkeypatch.setattr(Counted, "most", 0)
    for module in spread.hf.modules():
        if offload.is_elsewhere(module):
            offload.keep(module, Counted(offload.kept(module)))
    if not again:  # without it autograd holds them all
        monkeypatch.setattr("goldenlayers.hooks.read_again", lambda _hf: nullcontext())
    gl.locate(spread, FACTS, "lga", bootstrap=0)
    blocks = sum(p.numel() * 4 for b in spread.layers for p in b.module.parameters())
    assert (Counted.most < blocks / 3) == again


def test_the_folder_of_weights_on_disk_goes_with_the_model(tmp_path: Path) -> None:
    _, spread = pair("llama", tmp_path)
    root = tmp_path / "cache" / "offload"
    assert len(list(root.glob("*/*.safetensors"))) > 4
    del spread, _
    import gc

    gc.collect()
    assert not list(root.iterdir())


def test_what_fits_is_not_spread(tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path)
    assert not offload.is_spread(gl.load(tmp_path, device="auto").hf)
    with pytest.raises(UserError, match="max_memory"):
        gl.load(tmp_path, device="auto", max_memory={"cpu": "much"})
