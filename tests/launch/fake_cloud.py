"""A Google Cloud in a folder: stands in for gcloud, and on its workers for tmux, curl, pip, uv and gptjax.

    python fake_cloud.py NAME ARGUMENTS...      with FAKE_CLOUD=FOLDER, and on a worker FAKE_WORKER=<i>

FOLDER/cloud.json is the state, FOLDER/calls.jsonl what was called, FOLDER/worker<i>/ the home of each worker. A request
passes through `states`, one a look. `ends` says what becomes of each start in turn: an exit code, "running",
"preempted", or "vanished", where the slice is gone and its request does not tell yet. `broken` workers cannot install,
`deaf` ones are out of reach, `down` is a gcloud that fails, `full` one that has no chips to give.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

START = {
    "request": None,
    "workers": 4,
    "states": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
    "ends": [],
    "starts": 0,
    "broken": [],
    "deaf": [],
    "down": False,
    "full": False,
}
SSH = {"--zone", "--quiet", "--worker", "--command"}
FLAGS = {  # what gcloud's own help names, as far as it is used
    "queued-resources create": {"--zone", "--quiet", "--node-id", "--accelerator-type", "--runtime-version", "--spot"},
    "queued-resources delete": {"--zone", "--quiet", "--force"},
    "queued-resources list": {"--zone", "--quiet", "--filter", "--format"},
    "tpu-vm list": {"--zone", "--quiet", "--filter", "--format"},
    "tpu-vm ssh": SSH,
    "tpu-vm scp": SSH - {"--command"},
}
COMMANDS = ("gcloud", "tmux", "python3")
METADATA = """#!/bin/sh
case "$*" in
*Metadata-Flavor:Google*/agent-worker-number) printf %s "$FAKE_WORKER" ;;
*Metadata-Flavor:Google*/worker-network-endpoints) cat "$FAKE_CLOUD/endpoints" ;;
*) exit 22 ;;
esac
"""
FOLDER = pathlib.Path(os.environ.get("FAKE_CLOUD", "."))
WORKER = os.environ.get("FAKE_WORKER", "")


def load() -> dict[str, Any]:
    return json.loads((FOLDER / "cloud.json").read_text())


def save(cloud: dict[str, Any]) -> None:
    (FOLDER / "cloud.json").write_text(json.dumps(cloud))


def record(name: str, arguments: list[str], **more: Any) -> None:
    with open(FOLDER / "calls.jsonl", "a") as file:
        file.write(json.dumps({"name": name, "worker": WORKER, "arguments": arguments, **more}) + "\n")


def home(worker: int) -> pathlib.Path:
    return FOLDER / f"worker{worker}"


def install(directory: pathlib.Path) -> None:
    """Writes a command of each name into `directory`, in front of the real ones."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in COMMANDS:
        write_command(directory / name, name)
    (directory / "curl").write_text(METADATA)
    (directory / "curl").chmod(0o755)


def write_command(path: pathlib.Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {pathlib.Path(__file__)} {name} "$@"\n')
    path.chmod(0o755)


def gcloud(arguments: list[str]) -> int:
    record("gcloud", arguments)
    if arguments[0] == "storage":  # on a worker
        assert arguments[1:3] == ["rsync", "--recursive"]
        pathlib.Path(arguments[4], "train.bin").write_text(arguments[3])
        return 0
    assert arguments[:2] == ["compute", "tpus"]
    what, rest = " ".join(arguments[2:4]), arguments[4:]
    flags = {argument.partition("=")[0]: argument.partition("=")[2] for argument in rest if argument.startswith("--")}
    unknown = set(flags) - FLAGS[what]
    assert not unknown, f"{what}: unrecognized arguments: {unknown}"
    if load()["down"]:
        print("ERROR: (gcloud) You do not currently have an active account selected.", file=sys.stderr)
        return 1
    names = [argument for argument in rest if not argument.startswith("--")]
    return {
        "queued-resources create": create,
        "queued-resources delete": delete,
        "queued-resources list": list_requests,
        "tpu-vm list": list_slices,
        "tpu-vm ssh": ssh,
        "tpu-vm scp": scp,
    }[what](names, flags)


def create(names: list[str], flags: dict[str, str]) -> int:
    cloud = load()
    if cloud["request"] or cloud["full"]:
        print("ERROR: ALREADY_EXISTS" if cloud["request"] else "ERROR: RESOURCE_EXHAUSTED: quota", file=sys.stderr)
        return 1
    save(cloud | {"request": list(cloud["states"])})
    for worker in range(cloud["workers"]):
        home(worker).mkdir()
    return 0


def delete(names: list[str], flags: dict[str, str]) -> int:
    cloud = load()
    assert cloud["request"], "NOT_FOUND"
    assert "--force" in flags, "it still has a node"
    save(cloud | {"request": None})
    wipe(cloud)
    return 0


def wipe(cloud: dict[str, Any]) -> None:
    for worker in range(cloud["workers"]):
        shutil.rmtree(home(worker), ignore_errors=True)


def list_requests(names: list[str], flags: dict[str, str]) -> int:
    cloud = load()
    if cloud["request"]:
        print(cloud["request"][0])
        save(cloud | {"request": cloud["request"][1:] or cloud["request"]})
    return 0


def list_slices(names: list[str], flags: dict[str, str]) -> int:
    if home(0).exists():
        print("READY")
    return 0


def chosen(flags: dict[str, str]) -> list[int]:
    return list(range(load()["workers"])) if flags["--worker"] == "all" else [int(flags["--worker"])]


def ssh(names: list[str], flags: dict[str, str]) -> int:
    """Runs the command on each worker; one that fails does not keep it from the others."""
    assert home(0).exists(), "the slice is gone"
    codes = []
    for worker in chosen(flags):
        if worker in load()["deaf"]:
            print(f"ssh: connect to host 10.0.0.{worker} port 22: Connection timed out", file=sys.stderr)
            codes.append(255)
            continue
        environment = os.environ | {"HOME": str(home(worker)), "FAKE_WORKER": str(worker)}
        done = subprocess.run(["bash", "-c", flags["--command"]], env=environment, cwd=home(worker), check=False)
        codes.append(done.returncode)
    return max(codes)


def scp(names: list[str], flags: dict[str, str]) -> int:
    source, target = names
    assert target.endswith(":")
    for worker in chosen(flags):
        shutil.copy(source, home(worker))
    return 0


def python3(arguments: list[str]) -> int:
    record("python3", arguments)
    assert arguments[:3] == ["-m", "pip", "install"]
    if int(WORKER) in load()["broken"]:
        print("ERROR: No space left on device", file=sys.stderr)
        return 1
    write_command(pathlib.Path.home() / ".local/bin/uv", "uv")
    return 0


def uv(arguments: list[str]) -> int:
    record("uv", arguments)
    if arguments[0] == "venv":
        write_command(pathlib.Path(arguments[-1], "bin/python"), "trainer")
    return 0


def tmux(arguments: list[str]) -> int:
    """A start is over at once, unless it is to go on running."""
    alive = pathlib.Path.home() / "alive"
    if arguments[0] == "has-session":
        return 0 if alive.exists() else 1
    record("tmux", arguments, script=pathlib.Path("run.sh").read_text())
    cloud = load()
    end = (cloud["ends"] or ["running"])[0]
    if isinstance(end, int):
        subprocess.run(["bash", "-c", arguments[-1]], check=False)
    else:
        alive.touch()
        pathlib.Path("../gptjax.log").write_text("step 10/100  loss 5.0\n")
    if int(WORKER) == cloud["workers"] - 1:  # it was the last of them: the next start is another one
        cloud |= {"ends": cloud["ends"][1:], "starts": cloud["starts"] + 1}
        if end in ("preempted", "vanished"):
            cloud |= {"request": ["SUSPENDED"] if end == "preempted" else ["ACTIVE"]}
            wipe(cloud)
        save(cloud)
    return 0


def trainer(arguments: list[str]) -> int:
    told = {name: os.environ.get(f"JAX_{name}") for name in ("COORDINATOR_ADDRESS", "PLATFORMS")}
    record("trainer", arguments, told=told)
    code = load()["ends"][0]
    print(f"this start ends with {code}")
    return code


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2:]))
