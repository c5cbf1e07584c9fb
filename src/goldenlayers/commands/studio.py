"""``golden studio``: a page on this machine to look at facts and edit them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from goldenlayers.commands import shared
from goldenlayers.commands.options import Chat, ModelOptions, Role, Statistics
from goldenlayers.shown import put, result, say


@dataclass(frozen=True, kw_only=True)
class StudioConfig(ModelOptions):
    """Open a page on this machine: look at a fact, edit it, ask both models, see what moved.

    golden studio gemma3-270m
    golden studio smollm2-135m --port 8000
    """

    chat: Chat = False
    """Ask and edit by the model's own chat template."""

    port: Annotated[int, Role.PLACE] = 7860
    """Port that the page is served at."""

    host: Annotated[str, arg(metavar="ADDRESS"), Role.PLACE] = "127.0.0.1"
    """Address to listen on. Anything but this machine's own lets others use the model: there is no
    password."""

    statistics: Statistics = "package"
    """Text for the key statistics, as for `golden edit`."""


def run(config: StudioConfig) -> int:
    """Take the port, load the model and serve the page until Ctrl-C."""
    from goldenlayers.studio.serving import refuse_missing

    refuse_missing()
    from goldenlayers.studio import Workbench, bound, serve

    with bound(config.host, config.port) as listening:
        model = shared.load_model(config)
        bench = Workbench(model, statistics=config.statistics, cache_dir=config.cache_dir)

        def ready(url: str, _stop: object) -> None:
            result(model=model.name, url=url)
            put(f"golden studio: {url}")
            say("Ctrl-C ends it")

        serve(bench, listening, host=config.host, on_ready=ready)
    return 0
