"""gke_jobset.yaml, skypilot.yaml and the Dockerfile: their form, and what they mean."""

import re
import subprocess
from typing import Any

import jsonschema
import pytest
import yaml

from gptjax import errors
from tests import runs

LAUNCH = runs.REPOSITORY / "launch"
FINAL = {1, 2, 3, 65, 70, 71, 73, 74}  # what would fail in the same way again


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    """Returns the schema of an object that has no other fields."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT, FLAG = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}

NAMED = closed(["name", "value"], name=TEXT, value=TEXT)
IDS = {"runAsUser": COUNT, "runAsGroup": COUNT, "fsGroup": COUNT}

# JobSet v1alpha2, Job v1 and Pod v1, as far as the file uses them.
EXIT_CODES = {"containerName": TEXT, "operator": {"enum": ["In", "NotIn"]}, "values": listed({"minimum": 1})}
EXIT_RULE = closed(
    ["action", "onExitCodes"],
    action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
    onExitCodes=closed(["operator", "values"], **EXIT_CODES),
)
CONTAINER = closed(
    ["name", "image", "args", "resources"],
    name=TEXT, image=TEXT, args=listed(TEXT), env=listed(NAMED),
    ports=listed(closed(["containerPort"], containerPort={"type": "integer", "minimum": 1, "maximum": 65535})),
    resources=closed(["limits"], limits={"type": "object", "additionalProperties": COUNT}),
    securityContext=closed([], allowPrivilegeEscalation=FLAG),
    volumeMounts=listed(closed(["name", "mountPath"], name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)  # fmt: skip
CSI = closed(["driver"], driver=TEXT, readOnly=FLAG, volumeAttributes=TEXTS)
POD = closed(
    ["restartPolicy", "containers"],
    restartPolicy={"const": "Never"},  # the only one that a podFailurePolicy allows
    serviceAccountName=TEXT, terminationGracePeriodSeconds=COUNT, nodeSelector=TEXTS,
    securityContext=closed([], runAsNonRoot=FLAG, **IDS),
    containers=listed(CONTAINER), volumes=listed(closed(["name", "csi"], name=TEXT, csi=CSI)),
)  # fmt: skip
JOB = closed(
    ["parallelism", "completions", "backoffLimit", "template"],
    parallelism=COUNT, completions=COUNT, backoffLimit=COUNT,
    podFailurePolicy=closed(["rules"], rules=listed(EXIT_RULE)),
    template=closed(["spec"], metadata=closed([], annotations=TEXTS), spec=POD),
)  # fmt: skip
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
FAILURE_RULE = closed(
    ["action"],
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons=listed({"enum": REASONS}),
)
REPLICATED = closed(["name", "template"], name=TEXT, replicas=COUNT, template=closed(["spec"], spec=JOB))
JOBSET = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed(["name"], name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}, annotations=TEXTS),
    spec=closed(
        ["replicatedJobs"],
        failurePolicy=closed(["maxRestarts"], maxRestarts=COUNT, rules=listed(FAILURE_RULE)),
        replicatedJobs=listed(REPLICATED),
    ),
)
RECOVERY = {"strategy": {"enum": ["FAILOVER", "EAGER_NEXT_REGION"]}, "max_restarts_on_errors": COUNT}
RECOVERY |= {"recover_on_exit_codes": listed({"type": "integer", "minimum": 0, "maximum": 255})}
RESOURCES = closed(
    ["accelerators"],
    infra=TEXT, accelerators=TEXT, accelerator_args=closed([], runtime_version=TEXT), use_spot=FLAG,
    job_recovery=closed([], **RECOVERY),
)  # fmt: skip
SKYPILOT = closed(
    ["resources", "setup", "run"], name=TEXT, workdir=TEXT, resources=RESOURCES, envs=TEXTS, setup=TEXT, run=TEXT
)


def load(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text())


def jobset() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns the set's spec, its job's and its pod's."""
    spec = load("gke_jobset.yaml")["spec"]
    [replicated] = spec["replicatedJobs"]
    return spec, replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(("name", "schema"), [("gke_jobset.yaml", JOBSET), ("skypilot.yaml", SKYPILOT)])
def test_manifest_matches_the_schema_of_its_reader(name, schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(load(name), schema)


def what_happens(code: int) -> str:
    """Returns what a JobSet controller does once a pod of it has ended with `code`."""
    spec, job, pod = jobset()
    assert job["backoffLimit"] == 0
    reason = "BackoffLimitExceeded"
    for rule in job["podFailurePolicy"]["rules"]:
        wanted = rule["onExitCodes"]
        assert wanted["containerName"] in [container["name"] for container in pod["containers"]]
        if (code in wanted["values"]) == (wanted["operator"] == "In"):
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
            break
    rules = (r["action"] for r in spec["failurePolicy"]["rules"] if reason in r["onJobFailureReasons"])
    return next(rules, "RestartJobSet")


@pytest.mark.parametrize("code", [errors.PREEMPTED, errors.UNAVAILABLE, 134, 137, 143])
def test_jobset_restarts_after_preemption_or_host_loss(code):
    assert what_happens(code) == "RestartJobSet"
    assert jobset()[0]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.parametrize("code", sorted(FINAL))
def test_jobset_fails_on_exit_codes_that_would_repeat(code):
    assert what_happens(code) == "FailJobSet"


def test_the_exit_codes_are_the_documented_ones():
    documented = {getattr(errors, name) for name in dir(errors) if name.isupper() and name[0] != "_"}
    assert documented <= FINAL | {errors.OK, errors.UNAVAILABLE, errors.PREEMPTED}
    assert set(load("skypilot.yaml")["resources"]["job_recovery"]["recover_on_exit_codes"]) == {69, 75}


def test_jobset_runs_one_pod_per_host_of_a_slice():
    spec, job, pod = jobset()
    [container] = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == rows * columns / chips
    assert spec["replicatedJobs"][0]["replicas"] == 1
    assert container["env"] == [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}]
    annotations = load("gke_jobset.yaml")["metadata"]["annotations"]
    assert annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] == "cloud.google.com/gke-nodepool"


def test_no_pod_runs_as_root():
    _, _, pod = jobset()
    assert pod["securityContext"]["runAsNonRoot"]
    assert str(pod["securityContext"]["runAsUser"]) == docker("USER")[-1].split(":")[0]
    assert [c["securityContext"]["allowPrivilegeEscalation"] for c in pod["containers"]] == [False]


def test_checkpoints_go_to_the_bucket_and_volumes_exist():
    _, _, pod = jobset()
    [container] = pod["containers"]
    assert "--workdir=gs://MY_BUCKET/runs/gpt2_small" in container["args"]
    assert [m["name"] for m in container["volumeMounts"]] == [v["name"] for v in pod["volumes"]]
    assert "--workdir=gs://$BUCKET/runs/$CONFIG" in load("skypilot.yaml")["run"]


def test_command_in_the_first_line_fills_every_placeholder():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    command = text.splitlines()[0].removeprefix("# ").split(" | ")[0]
    filled = subprocess.check_output(["bash", "-c", command], cwd=LAUNCH.parent, text=True)
    assert not re.findall(r"MY_\w+", filled)
    assert yaml.safe_load(filled)["spec"] != yaml.safe_load(text)["spec"]


def docker(instruction: str) -> list[str]:
    """Returns the arguments of each such instruction, with its lines joined."""
    text = re.sub(r"\\\n", "", (LAUNCH / "Dockerfile").read_text())
    return [line.split(" ", 1)[1] for line in text.splitlines() if line.startswith(f"{instruction} ")]


def test_image_runs_gptjax_as_an_unprivileged_user():
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", docker("USER")[-1])
    assert docker("ENTRYPOINT") == ['["python", "-m", "gptjax.main"]']
    text = (LAUNCH / "Dockerfile").read_text()
    assert text.index("\nUSER ") > text.rindex("\nRUN ")
    assert f"--uid {docker('USER')[-1].split(':')[0]} " in docker("RUN")[0]


def test_image_copies_exactly_the_files_of_an_installation():
    copied = [name for line in docker("COPY") for name in line.split()[:-1]]
    assert {"pyproject.toml", "README.md", "LICENSE", "gptjax", "configs"} == set(copied)
    assert all((LAUNCH.parent / name).exists() for name in copied)


@pytest.mark.parametrize(
    ("platform", "installed"), [("cpu", "/app"), ("cuda", "/app[cuda]"), ("tpu", "/app[tpu]"), ("gpu", None)]
)
def test_platform_selects_the_installed_extra(tmp_path, platform, installed):
    pip = tmp_path / "pip"
    pip.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/said\n')
    pip.chmod(0o755)
    script = next(line for line in docker("RUN") if "pip install" in line)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PLATFORM": platform}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if installed else 2), done.stderr
    if installed:
        assert (tmp_path / "said").read_text().splitlines()[-2:] == [installed, "gcsfs"]
    else:
        assert "expected cpu, cuda or tpu" in done.stderr


@pytest.mark.parametrize("data", ["", "gs://bucket/data/mine"])
def test_skypilot_run_uses_the_first_worker_as_coordinator(tmp_path, data):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for path, text in (
        (tmp_path / ".venv/bin/python", 'printf "%s\\n" "$JAX_COORDINATOR_ADDRESS" "$JAX_PLATFORMS" "$@"'),
        (tmp_path / "curl", "printf %s name:0:10.0.0.7,name:1:10.0.0.8"),
    ):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "BUCKET": "mine", "CONFIG": "gpt2_xl", "DATA": data}
    command = ["bash", "-c", load("skypilot.yaml")["run"]]
    said = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    wanted = ["--config=configs/gpt2_xl.py", "--workdir=gs://mine/runs/gpt2_xl"]
    wanted += ["--config.data.path=data/train"] * bool(data)
    assert said.splitlines() == ["10.0.0.7:8476", "tpu,cpu", "-m", "gptjax.main", *wanted]
