"""``golden datasets``: the formats that are read, our own, and what is in a file."""

from __future__ import annotations

from goldenlayers.config import DatasetsConfig
from goldenlayers.errors import shortened
from goldenlayers.shown import put


def run(config: DatasetsConfig) -> int:
    """List the formats, print the schema, or read a file and say what is in it."""
    from goldenlayers import datasets

    if config.schema:
        put(*datasets.schema_text().split("\n"))
        return 0
    if config.data is not None:
        facts = datasets.load_facts(
            config.data, limit=config.limit, seed=config.seed, skip_invalid=config.skip_invalid
        )
        put(*facts.summary().split("\n"))
        for fact in list(facts)[: 3 if config.limit is None else None]:
            old = "(the model's own answer)" if fact.target_old is None else fact.target_old
            parts = [shortened(part, 200) for part in (fact.id, fact.prompt, old, fact.target)]
            put("  {}: {} … {} → {}".format(*parts))
        return 0
    from goldenlayers.report.terminal import show, table

    rows = [(info.name, info.title) for info in datasets.list_datasets()]
    show(table("Fact formats", ("name", "what it is"), rows))
    return 0
