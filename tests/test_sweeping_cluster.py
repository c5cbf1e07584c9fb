"""A sweep on a Ray cluster: a node that is lost, and what is said of nodes that do not fit."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from alike import alike
from families import tiny
from sweep_helpers import FAST, canonical, load_tiny, some_facts

import goldenlayers
from goldenlayers.errors import UserError
from goldenlayers.progress import Progress
from goldenlayers.statistics import key_statistics
from goldenlayers.sweeping import Workers, sweep
from goldenlayers.sweeping.workers import loader_of


def wait_until_a_worker(lives: bool, node: str, seconds: float = 120.0) -> None:
    """Wait until the cluster knows of a worker on the node, or of none any more: else the few cells
    are done before.
    """
    from ray._private.state import actors

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        there = [one for one in actors().values() if one["Address"]["NodeID"] == node]
        if lives == any(one["State"] == "ALIVE" for one in there):
            return
        time.sleep(0.1)
    raise AssertionError(f"no worker {'began' if lives else 'ended'} on the second node")


def test_a_node_that_is_lost_costs_no_row_and_doubles_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from goldenlayers.sweeping import cluster as ours

    # Ray's workers are no children of this process: they find the helpers, and the same package,
    # by this.
    folders = (Path(__file__).parent, Path(goldenlayers.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    monkeypatch.setenv("GOLDENLAYERS_CACHE", str(tmp_path))
    monkeypatch.setattr(ours, "_LOOK_SECONDS", 0.2)
    model = load_tiny()
    how: dict[str, Any] = {**FAST, "statistics": key_statistics(model, tokens=300)}
    alone = sweep(model, some_facts(), "rome", **how, progress=Progress(chunk=1))
    nodes = Cluster(initialize_head=True, head_node_args={"include_dashboard": False})
    try:
        second = nodes.add_node()
        new: list[Any] = []
        notes: list[str] = []

        def lose(rows: list[Any]) -> None:
            if not new:
                wait_until_a_worker(True, second.node_id)
                nodes.remove_node(second, allow_graceful=False)
                wait_until_a_worker(False, second.node_id)
                time.sleep(1)  # so that the sweep hears of it, too
            new.extend(rows)

        found = sweep(
            model,
            some_facts(),
            "rome",
            **how,
            workers=Workers(3, "ray", nodes.address, load=load_tiny),
            progress=Progress(chunk=1, on_rows=lose, on_note=notes.append),
        )
    finally:
        nodes.shutdown()
    assert canonical(found.rows) == canonical(new) == alike(canonical(alone.rows))
    assert found.cells == 12
    told = "\n".join(notes)
    assert "was lost" in told and "another worker starts in its place" in told
    assert "of 3 workers have not begun: each needs 1 CPU, and the cluster has 2 CPU" in told


def test_a_node_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("ray")
    from goldenlayers.sweeping.cluster import ClusterWorker, _here

    model = tiny("llama")
    monkeypatch.setenv("GOLDENLAYERS_CACHE", str(tmp_path))
    here = _here(key_statistics(model, [0], tokens=300))
    folder, manifest = here["statistics"]
    said = ClusterWorker().join(here)
    assert said.kind == "joined" and said.value[1]
    for other in ((str(tmp_path), manifest), (folder, manifest + b" "), None):
        assert not ClusterWorker().join(here | {"statistics": other}).value[1]
    newer = here | {"software": here["software"] | {"torch": "99.0"}}
    said = ClusterWorker().join(newer)
    assert said.kind == "user"
    expected = f"has torch {torch.__version__}. Expected torch 99.0, as where the sweep began"
    assert expected in str(said.value)


def test_a_worker_on_ray_counts_its_gpus_from_zero(monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama")
    monkeypatch.setattr(type(model), "device", torch.device("cuda:3"))
    there: Any = loader_of(model)
    given: Any = loader_of(model, numbered=False)
    assert there.keywords["device"] == "cuda:3" and given.keywords["device"] == "cuda"


def test_a_machine_with_too_few_gpus_is_refused_in_place_of_waiting():
    ray = pytest.importorskip("ray")
    from goldenlayers.sweeping.cluster import RayEngine

    there = torch.cuda.device_count()
    engine = RayEngine(there + 1, gpus=2)
    start: Any = None  # refused before it is looked at
    with pytest.raises(UserError, match=f"has {there} GPUs, and each of {there + 1} workers"):
        engine.open(start, there)
    engine.close([])
    assert not ray.is_initialized()


def test_ray_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"not installed.*goldenlayers\[ray\]"):
        sweep(load_tiny(), some_facts(), "ft-m", workers=Workers(1, "ray"))


@pytest.mark.parametrize("address", ["ray-address-without-port", "127.0.0.1:1", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_said_at_once(address: str):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=f"no Ray cluster at '{address}'"):
        sweep(load_tiny(), some_facts(), "ft-m", workers=Workers(1, "ray", address))
