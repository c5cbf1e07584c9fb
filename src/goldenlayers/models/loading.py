"""From a checked folder to a transformers model and its tokenizer, from a GGUF file to that folder.

GGUF weights are unpacked to float32: of the packaged models' values only 2-60 % per matrix are
exact in bfloat16 and 10-98 % in float16, so a shorter type would lose some.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL,
)

from goldenlayers.durable import disk_errors
from goldenlayers.errors import UserError, shortened
from goldenlayers.models import cache, checks
from goldenlayers.models.checks import check_loaded, check_room
from goldenlayers.models.files import Weights, find_weights, own_file, read_object
from goldenlayers.models.gguf import check_model, read_header
from goldenlayers.models.offload import Placing, settle
from goldenlayers.shown import say

_LAYOUT = "a decoder-only language model in save_pretrained layout"
_PACKAGES = (
    "Install what reads {} weights: pip install 'goldenlayers[quantised]' for bitsandbytes, "
    "gptqmodel for gptq and awq"
)
_SAVE_TOKENIZER = "Save the model's own tokenizer there: tokenizer.save_pretrained(directory)"


def open_folder(
    folder: Path,
    name: str,
    *,
    dtype: str,
    trust_remote_code: bool,
    placing: Placing | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the weights and the tokenizer of a model directory.

    They are on the CPU, unless ``placing`` spreads them, one after the other, over devices.

    Raises:
        UserError: the directory is incomplete, or holds a model that cannot be handled.
    """
    config = checks.read_config(folder)
    checks.check_config(config, name, trust_remote_code=trust_remote_code)
    weights = find_weights(folder)
    checks.check_sizes(config, weights, name)
    checks.check_tokenizer(folder, config, name)
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    size = weights.bytes if wanted == "auto" else weights.elements * wanted.itemsize
    quantised = bool(config.get("quantization_config"))
    spread = placing.options(weights.bytes if quantised else size) if placing is not None else {}
    if quantised and not spread:  # cannot be moved later
        spread = {"device_map": {"": placing.device if placing is not None else "cpu"}}
    problem = f"transformers {transformers.__version__} cannot load {name}"
    fix = _PACKAGES.format(config["quantization_config"]["quant_method"]) if quantised else ""
    with told(problem, expected=_LAYOUT, fix=fix), quiet_transformers():
        if trust_remote_code:
            options = {"use_safetensors": True, "output_loading_info": True, **spread}
            hf_model, report = getattr(transformers, _auto_class(config)).from_pretrained(
                str(folder), dtype=wanted, trust_remote_code=True, **options
            )
        else:
            hf_model, report = _read(folder, config, weights, name, dtype=wanted, **spread)
    settle(hf_model, spread)
    checks.check_loaded(report, config, name)
    tokenizer = _tokenizer(folder, config, name, trust_remote_code)
    # A few tokens more than embeddings are usual (Gemma 3 counts an image token), many are not.
    embeddings: Any = hf_model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if tokenizer.vocab_size > 1.05 * rows:
        raise UserError(
            f"The tokenizer of {name} is another model's: it has {tokenizer.vocab_size} tokens, "
            f"and the model {rows} embeddings",
            fix=_SAVE_TOKENIZER,
        )
    return hf_model, tokenizer


def _read(
    folder: Path, config: dict[str, Any], weights: Weights, name: str, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers reports about its weights.

    Transformers is given the configuration and the tensors, never the folder: so nothing else that
    lies there (adapters, pickles, code, kernels) can come in.
    """
    parsed = _configuration(config, folder)
    with torch.device("meta"):  # the classes and shapes alone, without memory
        empty = getattr(transformers, _auto_class(config)).from_config(parsed)
    checks.check_room(empty, weights.elements, weights.bytes, name)
    state: dict[str, torch.Tensor] = {}
    for path in weights.files:
        state |= load_file(path)
    model, report = type(empty).from_pretrained(
        None,
        config=empty.config,
        state_dict=state,
        ignore_mismatched_sizes=True,  # they are reported, and refused in our own words
        output_loading_info=True,
        **options,
    )
    model.config.name_or_path = model.name_or_path = str(folder)
    if (path := own_file(folder, "generation_config.json")) is not None:
        given = checks.without_steering(read_object(path))
        model.generation_config = transformers.GenerationConfig.from_dict(given)
    return model, report


def _configuration(config: dict[str, Any], folder: Path) -> Any:
    """The configuration as transformers reads it, from a directory that holds nothing else."""
    with tempfile.TemporaryDirectory() as alone:
        text = json.dumps(checks.without_steering(config))
        with disk_errors(Path(alone)):
            Path(alone, "config.json").write_text(text, encoding="utf-8")
        parsed = AutoConfig.from_pretrained(alone, local_files_only=True, trust_remote_code=False)
    parsed.name_or_path = str(folder)
    return parsed


def _tokenizer(
    folder: Path, config: dict[str, Any], name: str, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    with told(f"The tokenizer of {name} cannot be loaded", fix=_SAVE_TOKENIZER):
        with quiet_transformers():
            options: dict[str, Any] = {}
            if not trust_remote_code:
                options = {"config": _configuration(config, folder), "local_files_only": True}
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code, **options
            )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"a {type(tokenizer).__name__} is no tokenizer")
        says = tokenizer("a", add_special_tokens=False)["input_ids"]
    if not says:
        raise UserError(
            f"The tokenizer of {name} is empty: it turns text into nothing", fix=_SAVE_TOKENIZER
        )
    return tokenizer


def _auto_class(config: Mapping[str, Any]) -> str:
    """The auto class that loads the checkpoint as what it is (multimodal Gemma 3 and the like)."""
    kind = config.get("model_type")
    architectures = {str(item) for item in config.get("architectures") or ()}
    if kind in MULTIMODAL and (kind not in CAUSAL or MULTIMODAL[kind] in architectures):
        return "AutoModelForImageTextToText"
    return "AutoModelForCausalLM"


_INSTEAD = "Use the model's safetensors checkpoint (a directory or a hub id) instead"

# Texts whose tokens must survive saving and loading: spaces, digits, accents, CJK, an emoji.
_SAMPLES = (
    "The capital of France is Paris.",
    " Jules Verne's café – naïve  1905\n\tend",
    "東京 Привет שלום \U0001f389",
)


def convert_gguf(
    gguf: Path, folder: Path, *, label: str = "", progress: cache.Progress = say
) -> dict[str, Any]:
    """Convert ``gguf`` into ``folder``: save_pretrained layout, float32.

    Returns what the cache's manifest shall say about the model. ``label`` names it in messages.

    Raises:
        UserError: not a whole GGUF file, a kind of model or tokenizer that cannot be converted.
    """
    label = label or gguf.name
    header = read_header(gguf)
    check_model(gguf, header)
    cache.require_space(folder, 2 * 4 * header.elements, f"Converting {label}")
    if importlib.util.find_spec("accelerate") is None:  # transformers unpacks GGUF only with it
        raise UserError(
            f"Converting {label} needs the package accelerate, which is not installed",
            fix="python -m pip install accelerate",
        )
    progress(f"Converting {label} to safetensors, once; this takes a minute or two.")

    problem = (
        f"{gguf} (architecture '{header.architecture}') cannot be converted by transformers "
        f"{transformers.__version__}"
    )
    with told(problem, fix=_INSTEAD), _quiet_unpacking(), _alone(gguf) as (place, name):
        where: dict[str, Any] = {"gguf_file": name, "local_files_only": True}
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place, **where))
        check_room(empty, header.elements, gguf.stat().st_size, label)
        tokenizer = AutoTokenizer.from_pretrained(place, **where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            **where,
            **_dequantize_options(),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are reported, and refused in our own words
            output_loading_info=True,
        )
    model, report = loaded
    check_loaded(report, model.config.to_dict(), str(gguf))
    clear_quantization(model)
    _follow_bos_flag(tokenizer, header.values)
    model.config.name_or_path = ""
    with quiet_transformers():
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # the disk is full or read-only
            raise OSError(str(error)) from error
        again = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    for text in _SAMPLES:
        if again(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise UserError(
                f"The tokenizer of {gguf} does not survive saving: '{text}' is split differently",
                fix=_INSTEAD,
            )
    return {
        "file": label,
        "family": model.config.model_type,
        "layers": int(model.config.num_hidden_layers),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": "float32",
        "transformers": transformers.__version__,
    }


@contextmanager
def _alone(gguf: Path) -> Iterator[tuple[str, str]]:
    """(directory, name) of the file in a directory of its own.

    Transformers is given a directory, and would apply an adapter that lies beside the file.
    """
    with tempfile.TemporaryDirectory() as place:
        name = "model.gguf"
        try:
            Path(place, name).symlink_to(gguf.absolute())
        except OSError:  # a system without links
            shutil.copyfile(gguf, Path(place, name))
        yield place, name


def _dequantize_options() -> dict[str, Any]:
    """Ask for plain tensors where this transformers could keep the GGUF blocks packed."""
    kind = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": kind(dequantize=True), "device_map": "cpu"} if kind else {}


def clear_quantization(model: PreTrainedModel) -> None:
    """Forget that the weights were once quantised.

    Transformers keeps flags that make ``.float()`` and ``save_pretrained`` refuse a model although
    its tensors are plain ones.
    """
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.__dict__.pop("quantization_config", None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "hf_device_map"):
        model.__dict__.pop(name, None)


def _follow_bos_flag(tokenizer: PreTrainedTokenizerBase, header: dict[str, Any]) -> None:
    """Make the tokenizer begin texts with BOS exactly when the file says so."""
    wanted = header.get("tokenizer.ggml.add_bos_token")
    if wanted is None or tokenizer.bos_token_id is None or begins_with_bos(tokenizer) == wanted:
        return
    tokenizer.add_bos_token = bool(wanted)  # type: ignore[attr-defined]
    if begins_with_bos(tokenizer) != wanted:
        raise UserError(
            f"The GGUF file says that texts {'begin' if wanted else 'do not begin'} with BOS, "
            "and the converted tokenizer cannot be made to do so",
            fix=_INSTEAD,
        )


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS token before a text by itself."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


@contextmanager
def told(problem: str, *, expected: str = "", fix: str = "") -> Iterator[None]:
    """Within it, whatever a library raises over a file from elsewhere becomes a ``UserError``.

    Only for calls that hand such a file to transformers, tokenizers, gguf or safetensors, whose
    readers raise whatever they like. The message keeps the original's class and first words, and
    the original is its cause, so that a defect of ours can still be told from a bad file.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{problem}: it needs more memory than there is", fix=fix) from error
    except BaseException as error:
        # A panic in Rust code comes as a class of no module, derived from BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{problem}: {summary(error)}", expected=expected, fix=fix) from error


def summary(error: BaseException) -> str:
    """An error's class and the first two lines of its text, as one line of bounded length."""
    lines = [line.strip() for line in str(error)[:2000].strip().splitlines()[:2]]
    text = " ".join(line for line in lines if line)
    text = shortened(text, 400)
    name = type(error).__name__
    return f"{text} ({name})" if text else name


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hush the progress bars and advice of transformers; errors still come as exceptions."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    accelerate = getLogger("accelerate")
    level = accelerate.level
    logging.set_verbosity_error()
    accelerate.setLevel(ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        accelerate.setLevel(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _quiet_unpacking() -> Iterator[None]:
    """Hush transformers while it unpacks a GGUF file, which has a bar that its switch leaves on."""
    from transformers import modeling_gguf_pytorch_utils as unpacking

    bar: Any = getattr(unpacking, "tqdm", None)
    if bar is not None:
        setattr(unpacking, "tqdm", functools.partial(bar, disable=True))  # noqa: B010 - no stub
    try:
        with quiet_transformers():
            yield
    finally:
        if bar is not None:
            setattr(unpacking, "tqdm", bar)  # noqa: B010
