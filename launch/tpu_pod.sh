#!/usr/bin/env bash
# export ZONE=us-west4-a TYPE=v5litepod-16 NAME=gptjax
# launch/tpu_pod.sh create && launch/tpu_pod.sh install
# launch/tpu_pod.sh start --config=configs/gpt2_small.py --workdir=gs://BUCKET/runs/gpt2_small
# launch/tpu_pod.sh watch            (or: status; logs [WORKER|all]; delete)
#
# Rents one Cloud TPU slice as a queued resource and runs one gptjax command on all its workers. Every subcommand can be
# repeated, and skips completed work. `watch` ends with the run. Until then it recreates a preempted slice and restarts the
# command there. It also restarts the command after exit code 75 and after the loss of a worker.
# Variables: SPOT=0 (on demand), RUNTIME (the software version, by default the one for TYPE), DATA=gs://BUCKET/data/NAME
# (`install` copies it to data/NAME on every worker), MAX_RESTARTS (per slice), POLL_SECONDS, TAIL (of logs: -f follows).
set -euo pipefail
cd "$(dirname "$0")/.."
NAME=${NAME:-gptjax} ZONE=${ZONE:-us-west4-a} TYPE=${TYPE:-v5litepod-16} SPOT=${SPOT:-1} DATA=${DATA:-}
POLL_SECONDS=${POLL_SECONDS:-30} MAX_RESTARTS=${MAX_RESTARTS:-20} TAIL=${TAIL:--n 50}
case $TYPE in
    v5litepod-*) : "${RUNTIME:=v2-alpha-tpuv5-lite}" ;;
    v5p-*) : "${RUNTIME:=v2-alpha-tpuv5}" ;;
    v6e-*) : "${RUNTIME:=v2-alpha-tpuv6e}" ;;
    *) : "${RUNTIME:=tpu-ubuntu2204-base}" ;;
esac
remembered=runs/tpu_pod/$NAME # the command that `start` ran
again='0|69|75|134|137|143' # `watch` restarts the command after these exit codes: preempted, or a worker was lost

queue() { gcloud compute tpus queued-resources "$@" --zone="$ZONE" --quiet; }
tpu_vm() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --quiet; }
say() { echo "$NAME: $*"; }

metadata='curl -s -H Metadata-Flavor:Google http://metadata.google.internal/computeMetadata/v1/instance/attributes'
on() { # WORKER|all COMMAND: runs it on the worker; $n is the worker's number
    tpu_vm ssh "$NAME" --worker="$1" --command="n=\$($metadata/agent-worker-number); $2"
}

state() { # prints the state of the request or NONE; once the request is ACTIVE, that of the slice (READY, ...) or GONE
    local found
    found=$(queue list --filter="name~\"(^|/)$NAME\$\"" --format='value(state.state)') || return
    if [[ $found == ACTIVE ]]; then
        found=$(tpu_vm list --filter="name~\"(^|/)$NAME\$\"" --format='value(state)') || return
        found=${found:-GONE}
    fi
    echo "${found:-NONE}"
}

create() { # returns when the slice is READY
    local now asked=''
    while now=$(state) || return; do
        case $now in
            READY) say "READY: $TYPE in $ZONE" && return ;;
            NONE)
                set -- create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME"
                if [[ $SPOT == 1 ]]; then set -- "$@" --spot; fi
                queue "$@" && asked=1 || return
                ;;
            SUSPENDED | FAILED | PREEMPTED | TERMINATED | GONE)
                if [[ $asked ]]; then say "$now: see gcloud compute tpus queued-resources describe" && return 1; fi
                delete || return ;;
            *) say "$now, waiting" && sleep "$POLL_SECONDS" ;;
        esac
    done
}

delete() {
    local now
    now=$(state) || return
    if [[ $now == NONE ]]; then say "nothing to delete"; else say "deleting ($now)" && queue delete "$NAME" --force; fi
}

install() {
    local archive=runs/tpu_pod/gptjax.tgz version
    version=$(find gptjax configs pyproject.toml -type f ! -name '*.pyc' | LC_ALL=C sort | xargs cksum | cksum | tr ' ' -)
    mkdir -p runs/tpu_pod && tar -czf "$archive" --exclude=__pycache__ gptjax configs pyproject.toml README.md LICENSE
    { tpu_vm scp "$archive" "$NAME:" --worker=all && on all "set -e
mkdir -p ~/gptjax && cd ~/gptjax
if [ '$DATA' ]; then mkdir -p 'data/${DATA##*/}' && gcloud storage rsync --recursive '$DATA' 'data/${DATA##*/}'; fi
if [ \"\$(cat installed 2>/dev/null)\" = $version ]; then echo \"worker \$n: installed already\"; exit; fi
rm -rf gptjax configs && tar -xzf ~/gptjax.tgz
command -v tmux >/dev/null || sudo apt-get install -y -q tmux
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python -e '.[tpu]' gcsfs
echo $version >installed
echo \"worker \$n: installed\""; } || { say "install failed on a worker: repeat it, the others are left alone" && return 1; }
}

start() { # runs the command in $remembered. Worker 0 is the coordinator; with its address JAX finds the rest itself
    on all "set -e
cd ~/gptjax
if tmux has-session -t gptjax 2>/dev/null; then echo \"worker \$n: running already\"; exit; fi
cat >run.sh <<'END'
first=\$($metadata/worker-network-endpoints | cut -d, -f1)
export JAX_COORDINATOR_ADDRESS=\${first##*:}:8476 JAX_PLATFORMS=tpu,cpu PYTHONUNBUFFERED=1
code=0
.venv/bin/python -m gptjax.main$(cat "$remembered") >>~/gptjax.log 2>&1 || code=\$?
echo \$code >ended
END
rm -f ended && tmux new-session -d -s gptjax 'bash run.sh'
echo \"worker \$n: started\"" || { say "start failed on a worker: repeat it, those that run wait for it" && return 1; }
}

status() {
    on all "cd ~/gptjax 2>/dev/null || { echo \"worker \$n: not installed\"; exit; }
if tmux has-session -t gptjax 2>/dev/null; then now=running; elif [ -e ended ]; then now=\"ended \$(cat ended)\"
else now='not started'; fi
echo \"worker \$n: \$now: \$(tail -n 1 ~/gptjax.log 2>/dev/null)\""
}

watch() {
    local now ours='' restarts=0
    while [[ -e $remembered ]]; do # `delete` removes it
        now=$(state) || now='gcloud failed'
        if [[ $now == NONE && ! $ours ]]; then say "somebody has deleted it" && return 1; fi
        case $now in
            READY) look || return ;;
            NONE | SUSPENDED | FAILED | PREEMPTED | TERMINATED | GONE)
                say "$now: making it anew" && ours=1
                if create; then ours='' && restarts=0 && continue; fi
                ;;
            *) say "$now" ;;
        esac
        sleep "$POLL_SECONDS"
    done
    say "no command to watch: it was never started, or deleted" && return 1
}

look() { # checks all workers: restarts a run that can resume; otherwise exits, or returns the run's exit code
    local workers codes bad
    workers=$(status | sort -V) || { say "a worker does not answer" && return; }
    if grep -m 1 ': running:' <<<"$workers"; then return; fi
    codes=$(sed -n 's/^worker [0-9]*: ended \([0-9]*\):.*/\1/p' <<<"$workers" | sort -nu)
    if [[ $codes == 0 ]]; then say "the run is finished" && exit; fi
    if bad=$(grep -vxE -m 1 "$again" <<<"${codes:-0}"); then say "it failed with $bad: see logs all" && return "$bad"; fi
    if ((restarts++ >= MAX_RESTARTS)); then say "ended $restarts times: see logs all" && return 75; fi
    say "starting it (ended: $(xargs <<<"${codes:-nothing}"))"
    install && start || true
}

command=${1:-help}
if (($#)); then shift; fi
case $command in
    create | install | watch) ;;
    status) now=$(state) && say "$now" && if [[ $now != READY ]]; then exit; fi ;;
    delete) rm -f "$remembered" ;;
    logs) set -- "${1:-0}" "tail $TAIL ~/gptjax.log | sed -u \"s/^/[\$n] /\"" && command=on ;;
    start)
        (($#)) || { echo "usage: $0 start --config=FILE [FLAG ...]" >&2 && exit 2; }
        mkdir -p "${remembered%/*}" && printf ' %q' "$@" >"$remembered"
        ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
"$command" "$@"
