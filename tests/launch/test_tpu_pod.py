"""launch/tpu_pod.sh against a Google Cloud in a folder, where its commands on the workers really run."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import tarfile
from typing import Any

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SPEC = importlib.util.spec_from_file_location("fake_cloud", pathlib.Path(__file__).with_name("fake_cloud.py"))
fake_cloud = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fake_cloud)

PROMPT = "--config.train.sample_prompt=def f('x', $HOME)"
COMMAND = ("--config=configs/gpt2_small.py", "--workdir=gs://bucket/runs/small", PROMPT)


@dataclasses.dataclass(frozen=True)
class Cloud:
    root: pathlib.Path

    @property
    def source(self) -> pathlib.Path:
        return self.root / "source"

    def surroundings(self, **variables: str) -> dict[str, Any]:
        environment = {"PATH": f"{self.root / 'bin'}:/usr/bin:/bin", "HOME": str(self.root), "POLL_SECONDS": "0.01"}
        environment |= {"FAKE_CLOUD": str(self.root)} | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return {"env": environment, "cwd": self.root, **pipes}

    def pod(self, *arguments: str, expect: int = 0, **variables: str) -> str:
        """Runs tpu_pod.sh to its end, which must have the exit code `expect`, and returns all that it says."""
        command = [self.source / "launch/tpu_pod.sh", *arguments]
        done = subprocess.run(command, timeout=120, check=False, **self.surroundings(**variables))
        assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}"
        return done.stdout

    def start(self, *ends: int | str) -> str:
        """Starts COMMAND; `ends` says what becomes of this start, and of each after it."""
        self.set(ends=list(ends))
        return self.pod("start", *COMMAND)

    def watch_until(self, line: str) -> str:
        """Returns what `watch` says up to the second time that it says `line`, and ends it there."""
        said = ""
        with subprocess.Popen([self.source / "launch/tpu_pod.sh", "watch"], **self.surroundings()) as process:
            while said.count(f"{line}\n") < 2 and len(said) < 10_000 and (more := process.stdout.readline()):
                said += more
            process.terminate()
        assert said.count(f"{line}\n") == 2, said
        return said

    def set(self, **values: Any) -> None:
        path = self.root / "cloud.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def get(self, name: str) -> Any:
        return json.loads((self.root / "cloud.json").read_text())[name]

    def calls(self, name: str, *beginning: str) -> list[dict[str, Any]]:
        path = self.root / "calls.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [r for r in rows if r["name"] == name and r["arguments"][: len(beginning)] == list(beginning)]

    def requests(self, verb: str) -> list[list[str]]:
        return [call["arguments"][4:] for call in self.calls("gcloud", "compute", "tpus", "queued-resources", verb)]


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Cloud:
    made = Cloud(tmp_path)
    fake_cloud.install(tmp_path / "bin")
    (tmp_path / "endpoints").write_text("name:0:10.0.0.0,name:1:10.0.0.1")
    (tmp_path / "cloud.json").write_text(json.dumps(fake_cloud.START))
    for name in ("gptjax/main.py", "configs/gpt2_small.py", "pyproject.toml", "README.md", "LICENSE"):
        path = made.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name}\n")
    (made.source / "launch").mkdir()
    shutil.copy(LAUNCH / "tpu_pod.sh", made.source / "launch")
    return made


@pytest.fixture
def pod(cloud: Cloud) -> Cloud:
    """A slice that is there, with gptjax installed."""
    cloud.set(states=["ACTIVE"])
    cloud.pod("create")
    cloud.pod("install")
    return cloud


def test_create_requests_a_spot_slice_and_waits_for_it(cloud):
    said = cloud.pod("create", ZONE="us-west4-a", TYPE="v5litepod-16", NAME="mine")
    flags = ["--node-id=mine", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    assert cloud.requests("create") == [["mine", *flags, "--zone=us-west4-a", "--quiet"]]
    states = [line.split()[1] for line in said.splitlines() if line.endswith(", waiting")]
    assert states == ["WAITING_FOR_RESOURCES,", "PROVISIONING,"]
    assert said.endswith("mine: READY: v5litepod-16 in us-west4-a\n")


def test_create_keeps_an_existing_slice(cloud):
    cloud.pod("create")
    assert cloud.pod("create") == "gptjax: READY: v5litepod-16 in us-west4-a\n"
    assert len(cloud.requests("create")) == 1
    assert cloud.requests("delete") == []


@pytest.mark.parametrize(("state", "code"), [("SUSPENDED", 0), ("FAILED", 1)])
def test_create_replaces_a_suspended_or_failed_slice(cloud, state, code):
    if state == "FAILED":
        cloud.set(states=["FAILED"])
    assert ("gptjax: FAILED: see gcloud" in cloud.pod("create", expect=code)) == (state == "FAILED")
    assert len(cloud.requests("create")) == 1
    cloud.set(request=[state], states=["ACTIVE"])
    cloud.pod("create")
    assert (len(cloud.requests("delete")), len(cloud.requests("create"))) == (1, 2)


def test_create_without_spot_requests_on_demand(cloud):
    cloud.pod("create", SPOT="0")
    [arguments] = cloud.requests("create")
    assert "--spot" not in arguments


@pytest.mark.parametrize(
    ("kind", "runtime"), [("v6e-16", "v2-alpha-tpuv6e"), ("v5p-32", "v2-alpha-tpuv5"), ("v4-32", "tpu-ubuntu2204-base")]
)
def test_each_chip_type_has_its_runtime_version(cloud, kind, runtime):
    cloud.set(states=["ACTIVE"])
    cloud.pod("create", TYPE=kind)
    assert f"--runtime-version={runtime}" in cloud.requests("create")[0]


@pytest.mark.parametrize("subcommand", ["create", "delete"])
def test_gcloud_failure_creates_and_deletes_nothing(cloud, subcommand):
    cloud.set(down=True, request=["ACTIVE"] if subcommand == "delete" else None)
    assert "active account" in cloud.pod(subcommand, expect=1)
    assert cloud.requests("create") == cloud.requests("delete") == []


def test_a_refused_request_ends_create(cloud):
    cloud.set(full=True)
    assert "RESOURCE_EXHAUSTED" in cloud.pod("create", expect=1)
    assert len(cloud.requests("create")) == 1


def test_install_puts_the_source_and_the_data_on_every_worker(cloud):
    cloud.pod("create")
    (cloud.source / "gptjax/__pycache__").mkdir()
    (cloud.source / "gptjax/__pycache__/main.pyc").touch()
    said = cloud.pod("install", DATA="gs://bucket/data/mine")
    assert [line for line in said.splitlines() if "installed" in line] == [f"worker {i}: installed" for i in range(4)]
    for worker in range(4):
        home = cloud.root / f"worker{worker}/gptjax"
        assert (home / "gptjax/main.py").read_text() == "this is gptjax/main.py\n"
        assert (home / "configs/gpt2_small.py").exists()
        assert (home / "data/mine/train.bin").read_text() == "gs://bucket/data/mine"
    with tarfile.open(cloud.source / "runs/tpu_pod/gptjax.tgz") as archive:
        assert not [name for name in archive.getnames() if "pycache" in name]
    extras = [call["arguments"][-2:] for call in cloud.calls("uv", "pip", "install")]
    assert extras == [[".[tpu]", "gcsfs"]] * 4


def test_install_can_be_repeated_after_one_worker_has_failed(cloud):
    cloud.pod("create")
    cloud.set(broken=[2])
    said = cloud.pod("install", expect=1)
    assert "worker 2: installed" not in said
    assert said.count(": installed") == 3
    assert "install failed on a worker: repeat it" in said
    cloud.set(broken=[])
    again = cloud.pod("install")
    assert again.count("installed already") == 3
    assert "worker 2: installed\n" in again
    tries = [call["worker"] for call in cloud.calls("python3")]
    assert tries == ["0", "1", "2", "3", "2"]


def test_install_replaces_a_changed_source_and_removes_old_files(pod):
    assert pod.pod("install").count("installed already") == 4
    (pod.source / "gptjax/main.py").rename(pod.source / "gptjax/other.py")
    assert "already" not in pod.pod("install")
    assert [p.name for p in (pod.root / "worker3/gptjax/gptjax").iterdir()] == ["other.py"]


@pytest.mark.parametrize("endpoints", ["name:0:10.0.0.7,name:1:10.0.0.8", "10.0.0.7,10.0.0.8"])
def test_start_runs_one_command_on_all_workers_with_one_coordinator(pod, endpoints):
    pod.set(ends=[0])
    (pod.root / "endpoints").write_text(endpoints)
    said = pod.pod("start", *COMMAND)
    assert said.splitlines() == [f"worker {i}: started" for i in range(4)]
    starts = pod.calls("trainer")
    assert [call["worker"] for call in starts] == ["0", "1", "2", "3"]
    assert {tuple(call["arguments"]) for call in starts} == {("-m", "gptjax.main", *COMMAND)}
    told = {"COORDINATOR_ADDRESS": "10.0.0.7:8476", "PLATFORMS": "tpu,cpu"}
    assert [call["told"] for call in starts] == [told] * 4


def test_start_keeps_running_workers(pod):
    pod.start("running")
    (pod.root / "worker1/alive").unlink()  # one of them is not there any more
    said = pod.pod("start", *COMMAND).splitlines()
    assert said == [f"worker {i}: {'started' if i == 1 else 'running already'}" for i in range(4)]


def test_start_without_a_command_is_refused(pod):
    assert "usage" in pod.pod("start", expect=2)
    assert pod.calls("tmux") == []


def test_start_without_install_fails(cloud):
    cloud.pod("create")
    assert "start failed" in cloud.pod("start", *COMMAND, expect=1)


def test_status_reports_a_missing_or_pending_slice(cloud):
    assert cloud.pod("status") == "gptjax: NONE\n"
    cloud.pod("create")
    cloud.set(request=["PROVISIONING"])
    assert cloud.pod("status") == "gptjax: PROVISIONING\n"


def test_status_and_logs_report_each_worker(pod):
    assert "worker 3: not started: " in pod.pod("status")
    pod.start(0)
    said = pod.pod("status").splitlines()
    assert said == ["gptjax: READY", *(f"worker {i}: ended 0: this start ends with 0" for i in range(4))]
    assert pod.pod("logs", "2") == "[2] this start ends with 0\n"
    assert pod.pod("logs", "all").splitlines() == [f"[{i}] this start ends with 0" for i in range(4)]


@pytest.mark.parametrize(("end", "state"), [("preempted", "SUSPENDED"), ("vanished", "GONE")])
def test_watch_recreates_a_preempted_slice_and_restarts_the_command(pod, end, state):
    pod.start(end, 75, 69, 0)
    said = pod.pod("watch")
    assert f"gptjax: {state}: making it anew" in said
    assert said.endswith("gptjax: the run is finished\n")
    assert pod.get("starts") == 4
    assert len(pod.requests("create")) == 2
    assert len(pod.requests("delete")) == 1
    assert len({call["script"] for call in pod.calls("tmux")}) == 1
    assert {tuple(call["arguments"]) for call in pod.calls("trainer")} == {("-m", "gptjax.main", *COMMAND)}


def test_watch_retries_while_no_chips_are_available(pod):
    pod.start("preempted", 0)
    gcloud = pod.root / "bin/gcloud"
    real = gcloud.read_text()
    counter = pod.root / "refused"
    refuse = f'case "$*" in *create*) if [ ! -e {counter} ]; then touch {counter}; echo QUOTA; exit 1; fi ;; esac\n'
    gcloud.write_text(real.replace("exec", refuse + "exec"))
    said = pod.pod("watch")
    assert said.index("QUOTA") < said.index("gptjax: NONE: making it anew") < said.index("the run is finished")


def test_watch_restarts_the_run_after_workers_were_lost(pod):
    pod.start("running", 0)
    for worker, code in enumerate((69, 134, 75, 143)):
        (pod.root / f"worker{worker}/alive").unlink()
        (pod.root / f"worker{worker}/gptjax/ended").write_text(f"{code}\n")
    assert "gptjax: starting it (ended: 69 75 134 143)" in pod.pod("watch")
    assert pod.get("starts") == 2


def test_watch_waits_and_reports_the_first_running_worker(pod):
    pod.start("running")
    (pod.root / "worker0/alive").unlink()
    (pod.root / "worker0/gptjax/ended").write_text("2\n")
    said = pod.watch_until("worker 1: running: step 10/100  loss 5.0")
    assert "worker 2" not in said
    assert "failed" not in said
    assert pod.get("starts") == 1


@pytest.mark.parametrize(
    ("trouble", "said"), [({"deaf": [3]}, "a worker does not answer"), ({"down": True}, "gcloud failed")]
)
def test_watch_survives_unreachable_workers_and_gcloud_failures(pod, trouble, said):
    pod.start("running")
    pod.set(**trouble)
    assert "making it anew" not in pod.watch_until(f"gptjax: {said}")
    assert len(pod.requests("create")) == 1


@pytest.mark.parametrize(
    ("ends", "said", "code", "starts"),
    [*(([code], f"it failed with {code}", code, 1) for code in (1, 2, 70)), ([69] * 9, "ended 3 times", 75, 3)],
)
def test_watch_ends_with_a_permanent_failure_or_without_progress(pod, ends, said, code, starts):
    pod.start(*ends)
    assert said in pod.pod("watch", expect=code, MAX_RESTARTS="2")
    assert pod.get("starts") == starts


def test_watch_does_not_recreate_a_deleted_slice(pod):
    pod.start("running")
    pod.set(request=None)
    assert "somebody has deleted it" in pod.pod("watch", expect=1)
    assert len(pod.requests("create")) == 1


def test_delete_ends_all_and_can_be_repeated(pod):
    pod.pod("start", *COMMAND)
    assert "deleting (READY)" in pod.pod("delete")
    assert pod.get("request") is None
    assert pod.pod("delete") == "gptjax: nothing to delete\n"
    assert "never started, or deleted" in pod.pod("watch", expect=1)
    assert len(pod.requests("create")) == 1


def test_missing_subcommand_prints_the_usage(cloud):
    said = cloud.pod(expect=2)
    assert "launch/tpu_pod.sh create && launch/tpu_pod.sh install" in said
    assert "set -euo" not in said
    assert os.access(LAUNCH / "tpu_pod.sh", os.X_OK)
