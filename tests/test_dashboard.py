"""The dashboard, the alerts and what they ask for, which a server must tell."""

import asyncio
import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from asking import Server
from conftest import Serving
from prometheus_client.parser import text_string_to_metric_families
from scripted import ScriptedEngine

from pipeline.engine.llamacpp import LlamaCpp
from pipeline.serve.books.database import open_books
from pipeline.serve.books.ledger import Ledger

FOLDER = Path(__file__).parents[1] / "recipes" / "serve"
VLLM = Path(__file__).parents[1] / ".venv-vllm"
DASHBOARD: Any = json.loads((FOLDER / "grafana.json").read_text("utf-8"))
ALERTS: Any = yaml.safe_load((FOLDER / "alerts.yml").read_text("utf-8"))
NAME = re.compile(r"\b(?:pipeline_|process_|llamacpp:|vllm:)\w+")


def expressions() -> Iterator[str]:
    yield from (target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    yield from (variable.get("definition", "") for variable in DASHBOARD["templating"]["list"])
    yield from (rule["expr"] for group in ALERTS["groups"] for rule in group["rules"])


def asked_of(*owners: str) -> set[str]:
    """The names in them that begin like this."""
    names = {name for expression in expressions() for name in NAME.findall(expression)}
    return {name for name in names if name.startswith(owners)}


def samples(page: str) -> set[str]:
    families = text_string_to_metric_families(page)
    return {sample.name for family in families for sample in family.samples}


def test_what_the_dashboard_asks_of_a_server_is_on_its_page(
    serving: Serving, tmp_path: Path
) -> None:
    with (
        open_books(str(tmp_path)) as books,
        closing(Ledger(books)) as ledger,
        serving(ScriptedEngine(), ledger=ledger) as base,
    ):
        Server(f"{base}/v1").ask(messages=[{"role": "user", "content": "hi"}])
        with urllib.request.urlopen(f"{base}/metrics") as response:
            page = response.read().decode()

    asked = asked_of("pipeline_", "process_")
    assert len(asked) > 15
    assert asked <= samples(page)
    ours = {name for name in samples(page) if name.startswith("pipeline_")}
    forgotten = {name for name in ours - asked if not name.endswith(("_created", "_sum", "_count"))}
    assert forgotten == set(), "these stand in no panel"


def test_what_it_asks_of_llamacpp_is_on_that_page(tiny_gguf: Path, tmp_path: Path) -> None:
    async def page() -> str:
        log = tmp_path / "log"
        engine = await LlamaCpp.start(tiny_gguf, slots=1, context_tokens=64, log=log)
        try:
            return await engine.metrics()
        finally:
            await engine.close()

    asked = asked_of("llamacpp:")
    assert asked
    assert asked <= samples(asyncio.run(page()))


@pytest.mark.vllm
def test_what_it_asks_of_vllm_is_in_its_source() -> None:
    (source,) = VLLM.glob("lib/*/site-packages/vllm/v1/metrics/loggers.py")
    told = set(re.findall(r'"(vllm:\w+)"', source.read_text("utf-8")))
    asked = {name.removesuffix("_total") for name in asked_of("vllm:")}
    assert asked
    assert asked <= told


def test_grafana_can_import_it_into_any_data_source() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["title"]
    assert DASHBOARD["uid"]
    assert "id" not in DASHBOARD, "that of another Grafana"
    first, *others = DASHBOARD["templating"]["list"]
    assert (first["name"], first["type"], first["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    targets = [target for panel in panels for target in panel["targets"]]
    for asking in (*others, *panels, *targets):
        assert asking["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert {"type", "title", "fieldConfig"} <= panel.keys()
    known = {"$__rate_interval", *(f"${variable['name']}" for variable in others)}
    used = {name for target in targets for name in re.findall(r"\$\w+", target["expr"])}
    assert used <= known


def test_prometheus_is_told_of_the_alerts() -> None:
    told = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))
    assert [FOLDER / name for name in told["rule_files"]] == [FOLDER / "alerts.yml"]
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    assert all(rule["alert"] and rule["annotations"]["summary"] for rule in rules)
