"""The recipes in deploy/ and the Dockerfile fit the program: names, ports, metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from prometheus_client.parser import text_string_to_metric_families
from upstream import KEY, good, provider

import router

DEPLOY = ROOT / "deploy"
METRIC = re.compile(r"hermes_router_[a-z_]+")


def settings() -> set[str]:
    return {row[1] for row in router.setting_rows()} | {row[0] for row in router.FILE_SETTINGS}


def test_settings_that_recipes_set_exist():
    fly = DEPLOY.joinpath("fly.toml").read_text()
    named = set(re.findall(r"^  ([A-Z_]+) = ", fly, re.MULTILINE))
    compose = yaml.safe_load(DEPLOY.joinpath("compose.yaml").read_text())["services"]["router"]
    named |= set(compose["environment"])
    for document in yaml.safe_load_all(DEPLOY.joinpath("k8s/hermes-router.yaml").read_text()):
        if document["kind"] == "Deployment":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            named |= {row["name"] for row in container["env"]}
    assert {"HOST", "PORT", "HR_HOME"} == named <= settings()


def test_every_recipe_uses_the_usual_port():
    texts = [
        path.read_text() for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".toml", ".md")
    ]
    ports = {port for text in texts for port in re.findall(r"\b8\d{3}\b", text)}
    assert ports == {str(router.Config().port)}


def test_recipes_wait_longer_than_the_drain():
    limits = [
        re.search(r"stop_grace_period: (\d+)s", DEPLOY.joinpath("compose.yaml").read_text()),
        re.search(r'kill_timeout = "(\d+)s"', DEPLOY.joinpath("fly.toml").read_text()),
        re.search(
            r"GracePeriodSeconds: (\d+)", DEPLOY.joinpath("k8s/hermes-router.yaml").read_text()
        ),
        re.search(
            r"TimeoutStopSec=(\d+)", DEPLOY.joinpath("systemd/hermes-router.service").read_text()
        ),
    ]
    assert all(found and int(found[1]) > router.Config().drain_timeout for found in limits)


def test_kubernetes_runs_it_as_the_user_of_the_image():
    user = re.search(r"^USER (\d+)$", ROOT.joinpath("Dockerfile").read_text(), re.MULTILINE)
    documents = yaml.safe_load_all(DEPLOY.joinpath("k8s/hermes-router.yaml").read_text())
    pods = [d["spec"]["template"]["spec"] for d in documents if d["kind"] == "Deployment"]
    assert user and [pod["securityContext"]["runAsUser"] for pod in pods] == [int(user[1])]


def test_what_the_image_copies_is_in_the_build_context():
    copied = re.findall(
        r"^COPY (?!--from)(.+) \S+$", ROOT.joinpath("Dockerfile").read_text(), re.MULTILINE
    )
    files = {name for line in copied for name in line.split()}
    shown = {
        line[1:] for line in ROOT.joinpath(".dockerignore").read_text().split() if line[0] == "!"
    }
    assert files == shown and all(ROOT.joinpath(name).is_file() for name in files)


def test_the_space_names_the_port_and_the_kind():
    front = yaml.safe_load(DEPLOY.joinpath("hf-space/README.md").read_text().split("---")[1])
    assert (front["sdk"], front["app_port"]) == ("docker", router.Config().port)


@pytest.fixture
def metrics(upstream, make_app):
    client = make_app(**provider("groq", upstream(good()))).test_client()
    headers = {"Authorization": f"Bearer {KEY}"}
    for stream in (False, True):
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream}
        with client.post("/v1/chat/completions", json=body, headers=headers) as answer:
            assert answer.data
    return client.get("/metrics").text


def test_metrics_are_what_prometheus_reads(metrics):
    families = list(text_string_to_metric_families(metrics))
    assert families and all(family.documentation for family in families)
    samples = [sample for family in families for sample in family.samples]
    assert len({(s.name, *sorted(s.labels.items())) for s in samples}) == len(samples)


@pytest.mark.parametrize("file", ["grafana/dashboard.json", "prometheus/alerts.yml"])
def test_dashboards_and_alerts_use_metrics_that_exist(metrics, file):
    known = set(METRIC.findall(metrics))
    used = set(METRIC.findall(DEPLOY.joinpath(file).read_text()))
    assert used and used <= known


def test_the_dashboard_is_whole():
    board = json.loads(DEPLOY.joinpath("grafana/dashboard.json").read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}
    assert len(places) == len(panels)
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 and p["targets"] for p in panels)


def test_the_dockerfile_has_no_findings():
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if not program:
        pytest.skip("hadolint is not there for this platform")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
