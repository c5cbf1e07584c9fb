"""What the libraries under us raise, told as one of our errors; and their chatter, hushed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from goldenlayers.errors import UserError


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
    except Exception as error:
        raise UserError(f"{problem}: {summary(error)}", expected=expected, fix=fix) from error
    except BaseException as error:
        # A panic in Rust code comes as a class of no module, derived from BaseException.
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{problem}: {summary(error)}", expected=expected, fix=fix) from error


def summary(error: BaseException) -> str:
    """An error's class and the first two lines of its text, as one line of bounded length."""
    lines = [line.strip() for line in str(error)[:2000].strip().splitlines()[:2]]
    text = " ".join(line for line in lines if line)
    text = text if len(text) <= 400 else f"{text[:399]}…"
    name = type(error).__name__
    return f"{text} ({name})" if text else name


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hush the progress bars and advice of transformers; errors still come as exceptions."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
