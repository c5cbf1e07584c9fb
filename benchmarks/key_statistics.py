"""Key statistics of all layers: tokens per second against a plain forward over the same batches.

One run takes turns, batch by batch: the statistics pass (hooks, products of all layers, float64
sums), a plain forward without the head (hidden states only), and a plain forward with logits. Each
kind's time is its median batch, so a load that comes and goes on the machine hits all alike; CPU
seconds of this process are given beside wall-clock seconds, since they do not count other programs.
Sampling text from the model (keys read in the same pass) is timed apart.

    python benchmarks/key_statistics.py --model smollm2-135m --out statistics.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from goldenlayers import models
from goldenlayers.hooks import final_hidden
from goldenlayers.models import Model
from goldenlayers.statistics import StatisticsSettings, collect
from goldenlayers.statistics.sources import SampledSource, Source, TextSource
from goldenlayers.statistics.sums import MomentSums


class OneBatch(TextSource):
    """The rows of one batch, again and again."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids, self.batch_rows = ids, len(ids)
        self.length, self.skip = ids.shape[1], 1

    def batches(self, first: int, n_rows: int) -> Any:
        """The batch (B, T), once."""
        yield self.ids


def empty_sums(model: Model) -> MomentSums:
    return MomentSums.empty({b.index: b.down.in_features for b in model.layers})


def timed(fn: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    fn()
    return time.perf_counter() - wall, time.process_time() - cpu


def passes(model: Model, source: OneBatch, repeats: int) -> dict[str, Any]:
    sums = empty_sums(model)
    tokens = source.ids.numel()

    def forward(logits: bool) -> None:
        with torch.no_grad():
            if logits:
                model.hf(input_ids=source.ids, use_cache=False)
            else:
                final_hidden(model, source.ids)

    def gather() -> None:
        collect(model, source, sums, sums.n_rows + len(source.ids))

    kinds: dict[str, Callable[[], None]] = {
        "statistics": gather,
        "forward_hidden": lambda: forward(False),
        "forward_logits": lambda: forward(True),
    }
    for fn in kinds.values():
        fn()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, fn in kinds.items():
            times[name].append(timed(fn))
    result: dict[str, Any] = {"tokens_per_batch": tokens, "repeats": repeats}
    for clock, index in (("wall", 0), ("cpu", 1)):
        median = {n: statistics.median(t[index] for t in ts) for n, ts in times.items()}
        result[clock] = {
            "tokens_per_second": {name: tokens / seconds for name, seconds in median.items()},
            "ratio_to_forward_hidden": median["forward_hidden"] / median["statistics"],
            "ratio_to_forward_logits": median["forward_logits"] / median["statistics"],
        }
    return result


def sampling(model: Model, length: int) -> dict[str, Any]:
    source = SampledSource(model, length=length, seed=0)
    tokens = source.batch_rows * length
    alone = timed(lambda: _sample(model, source))
    sums = empty_sums(model)
    both = timed(lambda: collect(model, source, sums, source.batch_rows))
    return {
        clock: {
            "tokens_per_second_without_keys": tokens / alone[index],
            "tokens_per_second_with_keys": tokens / both[index],
        }
        for clock, index in (("wall", 0), ("cpu", 1))
    }


def _sample(model: Model, source: SampledSource) -> None:
    with torch.no_grad():
        source.sample(model, None, 0, source.batch_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default=None, help="a text file; random token ids if not given")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sample-length", type=int, default=32, help="0: do not time sampling")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    model = models.load(options.model)
    shape = (max(1, options.batch_tokens // options.length), options.length)
    if options.text is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.layers.vocab_size, shape, generator=generator)
    else:
        how = StatisticsSettings(
            options.text, length=options.length, batch_tokens=options.batch_tokens
        )
        source: Source = how.source(model)
        assert isinstance(source, TextSource)
        ids = next(source.batches(0, shape[0]))
    result = {
        "benchmark": "statistics",
        "model": options.model,
        "threads": torch.get_num_threads(),
        "shape": list(ids.shape),
        "layers": len(model.layers),
        "d_mlp": model.layers.d_mlp,
        **passes(model, OneBatch(ids), options.repeats),
    }
    if options.sample_length:
        result["sampling"] = sampling(model, options.sample_length)
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
