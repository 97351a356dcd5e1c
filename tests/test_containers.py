"""The files under docker/: they parse, fit each other, and name what is there."""

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

DOCKER = Path(__file__).parents[1] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/kv-eviction.json").read_text())


class Loader(yaml.SafeLoader):
    """YAML with the tag that compose files remove settings with."""


Loader.add_constructor("!reset", lambda loader, node: None)


def load(name):
    return yaml.load((DOCKER / name).read_text(), Loader)


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_images_do_not_run_as_root(kind):
    """By number, which Kubernetes can tell from root without the image's list of users."""
    lines = (DOCKER / f"Dockerfile.{kind}").read_text().splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if re.match("[A-Z]+ ", line)]
    assert [text for name, text in instructions if name == "USER"] == ["10001"]
    (image,) = (text for name, text in instructions if name == "FROM")
    assert re.search(r":v?\d", image), "the base image's version is pinned"


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_the_user_owns_every_folder_that_is_made_in_its_home(kind):
    """``install -d -o`` gives away the folders that it is told, and leaves those above to root.

    A server writes compiled code to ``.cache/vllm``, beside the folder of downloaded models.
    """
    (given,) = re.findall("install -d -o server (.*)", (DOCKER / f"Dockerfile.{kind}").read_text())
    folders = {Path(folder) for folder in given.split()}
    home = Path("/home/server")
    above = {parent for folder in folders for parent in folder.parents if home in parent.parents}
    assert above
    assert above <= folders


def test_compose_files_name_what_is_there():
    services = load("compose.yaml")["services"]
    for service in services.values():
        if "build" in service:
            assert (DOCKER.parent / service["build"]["dockerfile"]).is_file()
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        for volume in service["volumes"]:
            if volume.startswith("./"):
                assert (DOCKER / volume.split(":")[0]).exists()
    changes = load("compose.cpu.yaml")["services"]
    assert changes.keys() < services.keys()
    assert (DOCKER.parent / changes["server"]["build"]["dockerfile"]).is_file()


def test_grafana_reads_what_prometheus_scrapes():
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    used = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]}
    assert used == {source["uid"]}
    services = load("compose.yaml")["services"]
    assert source["url"].split("//")[1].split(":")[0] in services
    (scrape,) = load("prometheus.yaml")["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    assert target.split(":")[0] in services
    (provider,) = load("grafana/provisioning/dashboards/kv-eviction.yaml")["providers"]
    volumes = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert volumes["./grafana/dashboards"] == provider["options"]["path"]


def test_panels_do_not_overlap():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        set(itertools.product(range(g["x"], g["x"] + g["w"]), range(g["y"], g["y"] + g["h"])))
        for g in (panel["gridPos"] for panel in DASHBOARD["panels"])
    ]
    assert sum(map(len, cells)) == len(set().union(*cells))
    assert max(x for panel in cells for x, _ in panel) < 24
