"""Everything that is worth a GPU, in the shapes of models people use: seconds, rate, memory.

Weights are drawn at random on the device, so nothing is downloaded; the time does not depend on
them. Work: LGA of ``--lga-facts`` facts, a statistics pass, ROME and AlphaEdit of ``--facts``
facts in one batch each, and a sweep's row of as many at an early, a middle and a late layer, from
which the whole sweep is estimated. Each is done once to warm up and to count its products
(by torch's own formulas), then once by the clock. The rate is told as a share of what one large
matrix product reaches on the same device in the same dtype.

    python benchmarks/gpu.py --shapes llama-2-7b --out gpu.json
    python benchmarks/gpu.py --toy --device cpu          # the same, shrunk: does it run?

The editors search with 15 fixed steps and 3 prefixes, and never stop early: random weights would.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers import models as hf

from goldenlayers.datasets import load_facts
from goldenlayers.editors import edit, edit_each
from goldenlayers.locating.lga import lga_rows
from goldenlayers.models import Model
from goldenlayers.statistics import StatisticsSettings, key_statistics
from goldenlayers.statistics.moments import Covariance
from goldenlayers.sweeping import sweep

# Last on the path: a script may bear a library module's name.
sys.path.append(str(Path(__file__).parent))
from _tokenizer import trained_tokenizer

# What each shape's width is divided by for --toy, where it also has 4 layers.
_TOY = 16
VALUE = {"steps": 15, "prefixes": 3, "stop_loss": 0.0}


def gpt2_xl(toy: bool) -> PreTrainedConfig:
    """1.56 B parameters (Radford et al. 2019)."""
    width, heads, layers = (96, 4, 4) if toy else (1600, 25, 48)
    return hf.gpt2.GPT2Config(n_embd=width, n_head=heads, n_layer=layers, bos_token_id=0)


def llama(width: int, inner: int, kv_heads: int, vocabulary: int, toy: bool) -> PreTrainedConfig:
    shrink = _TOY if toy else 1
    return hf.llama.LlamaConfig(
        hidden_size=width // shrink,
        intermediate_size=inner // shrink,
        num_hidden_layers=4 if toy else 32,
        num_attention_heads=32 // (4 if toy else 1),
        num_key_value_heads=kv_heads // (4 if toy else 1),
        vocab_size=vocabulary,
    )


def gemma_3_12b(toy: bool) -> PreTrainedConfig:
    """The text part of Gemma 3 12B (its config.json, 2025)."""
    shrink, layers = (_TOY, 4) if toy else (1, 48)
    return hf.gemma3.Gemma3TextConfig(
        hidden_size=3840 // shrink,
        intermediate_size=15360 // shrink,
        num_hidden_layers=layers,
        num_attention_heads=16 // (4 if toy else 1),
        num_key_value_heads=8 // (4 if toy else 1),
        head_dim=256 // shrink,
        query_pre_attn_scalar=256 // shrink,
        sliding_window=1024,
        vocab_size=32_000 if toy else 262_208,
    )


SHAPES: dict[str, Callable[[bool], PreTrainedConfig]] = {
    "gpt2-xl": gpt2_xl,
    "llama-2-7b": lambda toy: llama(4096, 11008, 32, 32_000, toy),
    "llama-3-8b": lambda toy: llama(4096, 14336, 8, 128_256, toy),
    "gemma-3-12b": gemma_3_12b,
}


def drawn(shape: str, device: torch.device, dtype: torch.dtype, toy: bool) -> Model:
    """A model of the shape with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape](toy), dtype=dtype)
    return Model.wrap(model, trained_tokenizer(list(load_facts("starter"))), shape)


def weight_bytes(model: Model) -> int:
    return sum(p.numel() * p.element_size() for p in model.hf.parameters())


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 10) -> float:
    """Floating-point operations per second of a square matrix product, the median of repeats."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    seconds = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(seconds)[len(seconds) // 2]


class Products(TorchDispatchMode):
    """Counts floating-point operations of matrix products and attention.

    Torch's FlopCounterMode also follows modules, which fails where a gradient is taken within a
    forward pass, as our loss does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def measured(model: Model, work: Callable[[], Any], rate: float) -> tuple[dict[str, Any], Any]:
    """What ``work`` costs, and what it gives."""
    with Products() as counter:
        work()
    wait(model.device)
    gpu = model.device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    start = time.perf_counter()
    found = work()
    wait(model.device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(model.device) if gpu else None
    return {
        "seconds": seconds,
        "flops": counter.flops,
        "share_of_rate": counter.flops / seconds / rate,
        "peak_over_weights": peak / weight_bytes(model) if peak else None,
    }, found


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rate = product_rate(device, dtype, 512 if options.toy else 8192)
    model = drawn(shape, device, dtype, options.toy)
    facts = list(load_facts("starter"))[: max(options.facts, options.lga_facts)]
    few = facts[: options.facts]
    n_layers = len(model.layers)
    rows: dict[str, Any] = {}

    def lga() -> int:
        return sum(len(rows) for rows in lga_rows(model, facts[: options.lga_facts]))

    rows["LGA"], _ = measured(model, lga, rate)

    text = StatisticsSettings().text

    def statistics(layers: Sequence[int] | None = None) -> Any:
        return key_statistics(model, layers, text=text, tokens=options.tokens, cache=False)

    middle = n_layers // 2
    rows["statistics, all layers"], found = measured(model, statistics, rate)
    places = sorted({n_layers // 6, middle, n_layers - 2})
    kept: dict[int, Covariance] = {layer: found[layer] for layer in places}
    del found
    more: dict[str, Any] = {"layer": middle, "statistics": kept, **VALUE}
    edits: dict[str, Callable[[], Any]] = {
        "rome": lambda: edit_each(model, few, "rome", **more),
        "alphaedit": lambda: edit(model, few, "alphaedit", mode="batch", **more),
    }
    for name, work in edits.items():
        rows[f"{name}, {len(few)} facts"], _ = measured(model, work, rate)
    whole = 0.0
    for layer in places:
        row, _ = measured(
            model,
            lambda layer=layer: sweep(
                model, few, "rome", layers=[layer], statistics=kept, metrics=["rewrite"], **VALUE
            ),
            rate,
        )
        rows[f"sweep, layer {layer}"] = row
        whole += row["seconds"] / len(places)
    return {
        "shape": shape,
        "parameters": sum(p.numel() for p in model.hf.parameters()),
        "weights_bytes": weight_bytes(model),
        "layers": n_layers,
        "product_rate": rate,
        "rows": rows,
        "whole_sweep_seconds": whole * n_layers,
    }


def report(found: dict[str, Any]) -> None:
    print(
        f"\n{found['shape']}: {found['parameters'] / 1e9:.2f} B parameters, "
        f"{found['weights_bytes'] / 1e9:.1f} GB, matrix product {found['product_rate'] / 1e12:.1f} "
        "TFLOP/s"
    )
    print(f"{'work':28}{'seconds':>10}{'of the rate':>13}{'peak / weights':>16}")
    for name, row in found["rows"].items():
        peak = row["peak_over_weights"]
        print(
            f"{name:28}{row['seconds']:10.2f}{row['share_of_rate']:12.0%}"
            f"{'-' if peak is None else format(peak, '.2f'):>17}"
        )
    print(f"a sweep of all {found['layers']} layers: {found['whole_sweep_seconds'] / 60:.1f} min")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--facts", type=int, default=32, help="facts that are edited")
    parser.add_argument("--lga-facts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=20_000, help="of the key statistics")
    parser.add_argument("--toy", action="store_true", help="shrunk shapes: does it run?")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device is here; try --toy --device cpu")
    return options


def main() -> None:
    options = parse()
    on_gpu = options.device.startswith("cuda")
    result = {
        "benchmark": "gpu",
        "device": torch.cuda.get_device_name(options.device) if on_gpu else "cpu",
        "dtype": options.dtype,
        "toy": options.toy,
        "torch": torch.__version__,
        "shapes": [],
    }
    for shape in options.shapes:
        found = measure(shape, options)
        result["shapes"].append(found)
        report(found)
        if options.out:  # after each: a later shape may not fit
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
