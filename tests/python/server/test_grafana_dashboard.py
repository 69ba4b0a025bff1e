"""The example dashboard shows only what the server exports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from server.http_calls import call, complete, make_app
from server.metric_samples import Samples

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "grafana"
ADDED_BY_PROMETHEUS = {"job", "instance"}
# A metric and what is selected of it.
_SELECTOR = re.compile(r"\b((?:vllm|lora_serve):\w+|process_\w+)(?:\{([^}]*)\})?")


@pytest.fixture(scope="module")
def dashboard():
    return json.loads((FOLDER / "lora-serve.json").read_text())


@pytest.fixture(scope="module")
def samples():
    app = make_app()
    complete(app, model="sql")
    return Samples.parse(call(app, "GET", "/metrics").text)


def expressions(dashboard):
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return found + [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]


def test_every_metric_and_label_of_the_dashboard_is_exported(dashboard, samples):
    names = set()
    for expression in expressions(dashboard):
        labels_of_all = set()
        for name, selection in _SELECTOR.findall(expression):
            names.add(name)
            assert name in samples.by_name, expression
            labels = set(samples.by_name[name][0][0]) | ADDED_BY_PROMETHEUS
            assert set(re.findall(r"(\w+)=~?", selection)) <= labels, expression
            labels_of_all |= labels
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert set(group.split(", ")) <= labels_of_all | {"le"}, expression
    assert len(names) > 30


def test_legends_name_labels_that_the_query_keeps(dashboard):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            kept = {
                label
                for group in re.findall(r"by \(([^)]*)\)", target["expr"])
                for label in group.split(", ")
            }
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept


def test_dashboard_can_be_provisioned(dashboard):
    assert dashboard["id"] is None
    assert dashboard["uid"] == "lora-serve"
    assert not {"__inputs", "__requires"} & dashboard.keys()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    used = {name for expression in expressions(dashboard) for name in re.findall(r'"\$(\w+)"', expression)}
    assert used <= variables
    corners = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(corners) == len(set(corners))
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in dashboard["panels"])
