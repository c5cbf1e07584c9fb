"""Models spread over CPU memory and disk, or over two played devices: all is as on one."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from families import build, save, tiny
from torch import Tensor
from two_devices import OtherDeviceError, spread_over_two, two_devices

import goldenlayers as gl
from goldenlayers.decoding import greedy
from goldenlayers.delta import Dense, LowRank, WeightDelta
from goldenlayers.delta.apply import base_weight
from goldenlayers.delta.targets import find_targets
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact, Probe
from goldenlayers.models import Model, offload

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
    assert offload.sizes(spread.hf)["disk"] > (1 - share) * size
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


def everything(model: Model) -> list[object]:
    """What layer methods, statistics, editors, evaluation and decoding give."""
    statistics = gl.key_statistics(model, tokens=128, cache=False)
    found: list[object] = [statistics[2].moment.tolist()]
    methods: dict[str, dict[str, Any]] = {
        "lga": {},
        "cma": {"samples": 2, "known": False},
        "transfer": {"statistics": statistics},
    }
    for method, how in methods.items():
        ranking = gl.locate(model, FACTS, method, bootstrap=0, **how)
        found.append([layer.score for layer in ranking.layers])
    settings: dict[str, Any] = {"steps": 2, "prefixes": 1, "statistics": statistics}
    delta = WeightDelta({})
    editors: list[tuple[str, int, dict[str, Any]]] = [
        ("clear-rome", 1, {**settings, "neighbours": 3}),
        ("pmet", 2, {**settings, "layers_before": 1}),
        ("ft-m", 3, {"steps": 2}),
    ]
    for editor, layer, more in editors:
        delta = gl.edit(model, FACTS[:1], editor, layer=layer, **more)
        found += [delta.dense(n).tolist() for n in delta.changes]
        found.append(delta.norms(model))
    with delta.applied(model):
        found += list(gl.evaluate(model, FACTS).rows)
        found.append(greedy(model, [[5, 6, 7]], 4))
    found += list(gl.sweep(model, FACTS[:1], "rome", layers=[3], **settings).rows)
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_everything_is_the_same_on_disk_and_on_two_devices(name: str, tmp_path: Path) -> None:
    plain, spread = pair(name, tmp_path)
    expected, hf, layers = everything(plain), build(name), plain.layers
    if layers.tied:  # once is enough
        assert everything(spread) == expected
    upper = [*[block.path for block in layers][2:], layers.final_norm_path]
    upper += [] if layers.tied else [layers.head_path]
    with two_devices() as mode:
        spread_over_two(hf, lambda path: any(f"{path}.".startswith(f"{one}.") for one in upper))
        model = Model.wrap(hf, plain.tokenizer, plain.name)
        assert everything(model) == expected
    assert {str(device) for device in mode.seen} == {"cpu", "mtia:0", "mtia:1"}


def test_two_devices_refuse_to_mix() -> None:
    with two_devices():
        one, other = (torch.ones(2, device=f"mtia:{n}") for n in range(2))
        assert str((one + one).device) == "mtia:0"
        with pytest.raises(OtherDeviceError, match=r"mtia:0.*mtia:1"):
            _ = one + other
        assert str((one.to(other) + other).device) == "mtia:1"


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


def test_weights_kept_in_memory_by_accelerate_itself() -> None:
    plain = tiny("llama")
    hf = build("llama")
    cpu_offload(hf, torch.device("cpu"))
    offloaded = Model.wrap(hf, plain.tokenizer)
    ids = torch.tensor([[5, 6, 7, 8]])
    clean = plain.hf(ids).logits
    assert all(parameter.is_meta for parameter in offloaded.hf.parameters())
    assert offloaded.fingerprint() == plain.fingerprint()
    delta = gl.edit(plain, FACTS[:1], "ft-m", layer=1, steps=2)
    again = gl.edit(offloaded, FACTS[:1], "ft-m", layer=1, steps=2)
    assert all(torch.equal(delta.dense(n), again.dense(n)) for n in delta.changes)
    with delta.applied(plain), delta.applied(offloaded):
        assert torch.equal(offloaded.hf(ids).logits, plain.hf(ids).logits)
        assert not torch.equal(plain.hf(ids).logits, clean)
    assert torch.equal(offloaded.hf(ids).logits, clean)


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
