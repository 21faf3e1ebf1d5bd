"""The same experiment on a Ray cluster: the same bytes, whatever dies on the way."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from scale_rae.errors import InputError
from scale_rae.options import SamplingOptions
from scale_rae.promptfile import read_prompts
from scale_rae.scaling import object_store, ray_cluster
from scale_rae.scaling.events import Event, Message, PromptFailed, PromptFinished, WorkerLoaded
from scale_rae.scaling.launch import run
from scale_rae.scaling.ray_cluster import Actor, RayCluster
from scale_rae.scaling.settings import Settings
from scale_rae.scaling.store import Store
from scale_rae.scaling.worker import Assignment
from tests.helpers.ray_actors import Broken, Fragile
from tests.scaling.conftest import NAME, QUICK, Scale, snapshot

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the ray extra")
ROOT = Path(__file__).parents[2]
ON_RAY = ["--launcher", "ray", "--num-cpus-per-worker", "1"]
SETTINGS = Settings(  # QUICK's
    "prompts.jsonl",
    "shapes",
    n_samples=2,
    options=SamplingOptions(steps=2, solver="dpmpp_2m"),
    reward=None,
    batch_size=2,
)


class Nodes:
    """A cluster of processes on this machine: a head and another node, with one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._options: dict[str, Any] = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **self._options})
        self.add()

    def add(self) -> None:
        self._node = self.cluster.add_node(num_cpus=1, **self._options)

    def lose(self, workers: Sequence[int], processes: Sequence[int]) -> int:
        """Kills the node that is not the head, with all its processes, and adds another; returns its worker."""
        pid = self._node.all_processes["raylet"][0].process.pid
        (lost,) = [
            w for w, p in zip(workers, processes, strict=True) if pid in {q.pid for q in psutil.Process(p).parents()}
        ]
        self.cluster.remove_node(self._node, allow_graceful=False)
        self.add()
        return lost


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # which has it keep to the loopback address
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(ray_cluster, "LOOK", 0.1)
        nodes = Nodes()
        patch.setenv("RAY_ADDRESS", nodes.cluster.address)
        yield nodes
        nodes.cluster.shutdown()


def draw(scale: Scale, listen: Callable[[Event], None] = lambda event: None, **cluster: int) -> Any:
    """What the command does, with a listener of ours."""
    return run(SETTINGS, read_prompts(scale.prompts), scale.out, RayCluster(1, **cluster), None, listen)


def process(folder: Path, number: int) -> int:
    """The process of a worker, from its log."""
    found = re.findall(r"process (\d+)", (folder / "logs" / f"worker-{number}.log").read_text())
    return int(found[-1])


@needs_ray
def test_a_killed_driver_and_a_lost_node(scale: Scale, reference: dict[str, bytes], nodes: Nodes) -> None:
    command = [sys.executable, "-m", "scale_rae", "scale", "t2i", *QUICK, *ON_RAY, "--num-workers", "1"]
    command += ["--metadata-file", str(scale.prompts), "--output-dir", str(scale.out)]
    store = Store(scale.folder, SETTINGS)
    store.make_folders()
    held = [store.lock_prompt(index) for index in (2, 7)]  # as by another worker, so that these are not done too early
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240  # against hanging only
    while not list(scale.folder.glob("0*/metadata.jsonl")):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert [p.parent.name for p in scale.folder.glob("0*/metadata.jsonl")] == ["00000"]

    loaded: list[int] = []
    lost: list[int] = []
    said: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Message):
            said.append(event.text)
        if not isinstance(event, WorkerLoaded):
            return
        loaded.append(event.worker)
        if len(loaded) == 2:
            lost.append(nodes.lose(loaded, [process(scale.folder, worker) for worker in loaded]))
        elif len(loaded) == 3:
            for lock in held:
                assert lock is not None
                lock.close()

    outcome = draw(scale, listen)
    assert (outcome.failed, outcome.unfinished) == ({}, [])
    assert outcome.drawn == 8
    assert len(loaded) == 3
    assert any(text.startswith(f"worker {lost[0]} is gone") for text in said)
    assert snapshot(scale.folder) == reference


@needs_ray
def test_results_in_a_store(
    scale: Scale, reference_folder: Path, nodes: Nodes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Files of this machine, but reached as any store is: by fsspec's calls alone. One prompt is done, one partly."""
    monkeypatch.setattr(object_store, "SETTLE", 0.0)
    folder = tmp_path / "store" / NAME
    for name in ("experiment.json", "00000", "00007", ".work/batches/00000", ".work/batches/00007"):
        whole = reference_folder / name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, folder / name)
    (folder / "00000" / "samples" / "00003.png").unlink()
    result = scale(*ON_RAY, "--output-dir", f"local://{tmp_path}/store", "--num-workers", 1, device=False)
    assert result.code == 0
    assert "1 prompt done already, 2 to do" in result.err
    assert "00003.png: missing; made again" in result.err
    assert "6 images drawn" in result.err
    assert snapshot(folder) == snapshot(reference_folder)
    assert sorted(p.name for p in folder.iterdir()) == [".work", "00000", "00002", "00007", "experiment.json"]
    assert [p.name for p in (folder / ".work").iterdir()] == ["batches"]  # no lease is left


@needs_ray
def test_a_prompt_of_which_workers_die_fails(scale: Scale, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, although its worker draws other prompts with it."""
    monkeypatch.setattr(ray_cluster, "Actor", Fragile)
    monkeypatch.setattr(Settings, "prompts_together", lambda settings, prompts: 3)
    events: list[Event] = []
    outcome = draw(scale, events.append)
    assert list(outcome.failed) == [7]
    assert outcome.failed[7].startswith("3 workers died of it; the last: ActorDiedError: ")
    assert {e.index for e in events if isinstance(e, PromptFinished)} == {0, 2}
    assert [e.index for e in events if isinstance(e, PromptFailed)] == [7]
    assert outcome.stages == {"drawing": 2.0}


@needs_ray
def test_workers_that_cannot_load_end_the_run(scale: Scale, nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "Actor", Broken)
    monkeypatch.setattr(ray_cluster, "PAUSE", 0.1)
    result = scale(*ON_RAY, device=False)
    assert result.code == 1
    assert "error: 3 workers in a row died while they loaded; the last: ActorDiedError" in result.err
    result = scale(*ON_RAY, "--n-samples", 1, "--output-dir", scale.out / "other", device=False)
    assert (result.code, result.err.splitlines()[-1]) == (1, "error: no such model")


@needs_ray
def test_a_cluster_without_room(scale: Scale, nodes: Nodes) -> None:
    result = scale("--launcher", "ray", device=False)
    assert result.code == 1
    assert "the cluster has no GPU; --num-cpus-per-worker N has workers use CPUs" in result.err
    result = scale("--launcher", "ray", "--num-cpus-per-worker", 64, device=False)
    assert result.code == 1
    assert "--num-cpus-per-worker 64: no node of the cluster has that many" in result.err


def test_without_ray(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find_spec(name, *a))
    monkeypatch.setattr("scale_rae.scaling.launch.run", None)  # not reached
    result = scale("--launcher", "ray", device=False)
    assert result.code == 1
    assert result.err == ('error: --launcher ray: needs ray, which is not installed; pip install "scale-rae[ray]"\n')


@pytest.mark.parametrize("option", [["--device", "cpu"], ["--devices", "cpu,cpu"]])
def test_devices_are_rays(scale: Scale, option: list[str]) -> None:
    result = scale("--launcher", "ray", *option, device=False)
    assert result.code == 2
    assert "not with --launcher" in " ".join(result.err.split())


@pytest.mark.parametrize("option", ["--num-workers", "--num-cpus-per-worker"])
def test_numbers_of_workers(scale: Scale, option: str) -> None:
    result = scale(option, 2)
    assert result.code == 2
    assert "only with --launcher ray" in " ".join(result.err.split())
    if importlib.util.find_spec("ray") is not None:
        result = scale("--launcher", "ray", option, 0, device=False)
        assert result.code == 2
        assert f"{option} 0: must be at least 1" in result.err


@needs_ray
def test_not_under_another_launcher(scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    result = scale(*ON_RAY, device=False)
    assert result.code == 1
    assert "to be started once, not in 2 processes" in result.err


def test_a_folder_that_a_node_does_not_share(scale: Scale) -> None:
    """Another machine has a folder of that name, but not the one that the driver has locked."""
    with pytest.raises(InputError, match="not the same folder on node"):
        Actor().load(str(scale.folder), SETTINGS, Assignment(0, "cpu", [], [], {}), "process 1 on elsewhere")


def test_importing_loads_neither_ray_nor_torch() -> None:
    code = "import scale_rae, sys, scale_rae.scaling.ray_cluster; print({'ray', 'torch', 'upath'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ran.stdout == "set()\n"


@needs_ray
@pytest.mark.parametrize("version", ["2.40.0", "2.51.2", "1.13.0rc1"])
def test_a_ray_without_tokens_is_refused(scale: Scale, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Its clusters run code for whoever reaches their ports."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    monkeypatch.setattr("scale_rae.scaling.launch.run", None)  # not reached
    result = scale(*ON_RAY, device=False)
    assert result.code == 1
    assert f"error: --launcher ray: Ray {version} knows no tokens" in result.err
    assert "Ray 2.52 or newer is needed" in result.err
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.100.0")
    ray_cluster.check_installed()


@needs_ray
def test_a_cluster_that_is_started_here_asks_for_a_token(tmp_path: Path) -> None:
    """Ray listens on all interfaces, and unpickles what lies in its store; nothing of the working folder is imported."""
    for name in ("random", "json", "typing", "secrets", "socket"):
        (tmp_path / f"{name}.py").write_text("import os\nos.mkdir('imported')\n")
    # As many do by accident: an empty part of the path, which is the working folder.
    started = subprocess.run(
        [sys.executable, "-P", "-c", STARTED, str(ROOT)], capture_output=True, text=True, cwd=tmp_path
    )
    assert started.returncode == 0, started.stderr
    found = json.loads(started.stdout.splitlines()[-1])
    assert "is started on this machine" in found["said"]
    assert found["with"] == 1
    assert found["after"] == [0, None, str(tmp_path)]
    assert "authenticat" in found["without"].lower()
    assert str(tmp_path) not in found["path"]
    assert "" not in found["path"]
    assert not (tmp_path / "imported").exists()


# RAY_ADDRESS="" is no address. The cluster of other tests may be here, so that Ray must not look for one by itself.
STARTED = """
import contextlib, json, os, subprocess, sys
sys.path.append(sys.argv[1])
os.environ.update(PYTHONPATH=":/nowhere", RAY_ADDRESS="", RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
import ray
from ray._raylet import get_authentication_mode
from scale_rae.scaling import ray_cluster

init, found = ray.init, {}

def first_nothing(address, **options):
    if address == "auto":
        raise ConnectionError
    return init(address, num_cpus=1, **options)

ray.init = first_nothing
with ray_cluster.connected(lambda event: found.update(said=event.text)):
    found["with"] = int(get_authentication_mode())
    found["path"] = ray.get(ray.remote(lambda: __import__("sys").path).remote())
    address = ray.get_runtime_context().gcs_address
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    code = f"from ray._raylet import GcsClient; print(GcsClient(address={address!r}).internal_kv_keys(b'', None))"
    found["without"] = subprocess.run([sys.executable, "-P", "-c", code], env=stranger, capture_output=True, text=True).stderr
found["after"] = [int(get_authentication_mode()), os.environ.get("RAY_AUTH_TOKEN"), os.getcwd()]
print(json.dumps(found))
"""


@needs_ray
@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nobody_listens(scale: Scale, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Ray itself, which would try for minutes, is not asked."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = form.format(server.getsockname()[1])
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.init", None)  # not reached
    result = scale(*ON_RAY, device=False)
    assert result.code == 1
    assert f"no connection to the Ray cluster at {address} (RAY_ADDRESS): ConnectionRefusedError" in result.err
