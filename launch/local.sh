#!/usr/bin/env bash
# launch/local.sh 2 --config=configs/quickstart.py --workdir=runs/two
#
# Starts N processes of one run on this machine, each with a GPU of its own if there are GPUs. Every output line starts
# with its process number, and is also in $LOGS/process-<i>.log. SIGTERM, SIGINT and SIGHUP ask all to save and exit. A
# second signal ends them at once. If one fails, the script stops the others. It ends with the first failure's code, or 75.
# Variables: LOGS (a directory), PORT, GRACE_SECONDS (from the first failure to SIGKILL), PYTHON.
set -euo pipefail

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
    echo "usage: $0 N --config=FILE [FLAG ...]: N processes of python -m gptjax.main" >&2
    exit 2
fi
count=$1 python=${PYTHON:-python} grace=${GRACE_SECONDS:-60}
shift
IFS=, read -r -a cards <<<"${CUDA_VISIBLE_DEVICES:-}"
if ((${#cards[@]} && ${#cards[@]} < count)); then
    echo "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: too few for $count processes" >&2
    exit 2
fi
free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=${PORT:-$("$python" -c "$free_port")}
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs" && echo "$count processes, logs in $logs"

mark() { while IFS= read -r line || [[ $line ]]; do printf '[%s] %s\n' "$1" "$line" 2>/dev/null || true; done; }
start() { # one process. Only Python reacts to signals: tee and mark outlive it, and mark ignores a closed stdout
    trap : TERM INT HUP
    CUDA_VISIBLE_DEVICES=${cards[$1]:-$1} "$python" -m gptjax.main "${@:2}" --coordinator="127.0.0.1:$port" \
        --num_processes="$count" --process_id="$1" 2>&1 </dev/null |
        { trap '' TERM INT HUP && tee "$logs/process-$1.log" | mark "$1"; }
}
send() { for pid in "${pids[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null || true; done; }
rank() { # severity of an exit code: 0, ended by our signal, preempted, failed
    if (($1 == 0)); then rank=0; elif (($1 > 128 && ending)); then rank=1; elif (($1 == 75)); then rank=2; else rank=3; fi
}
forward() { if ((started)); then ending=1 && send "$1"; else asked=$1; fi; }

started=0 asked='' ending=0 code=0 worst=0 deadline='' pids=()
trap 'forward TERM' TERM HUP && trap 'forward INT' INT
trap '' PIPE # the reader may have exited
set -m # a process group each, which the terminal's Ctrl-C does not reach: a second signal would end it unsaved
for ((i = 0; i < count && !${#asked}; i++)); do start "$i" "$@" & pids+=($!); done
set +m && started=1 && if [[ $asked ]]; then forward "$asked"; fi
if ((i < count)); then code=75 worst=2; fi
while ((${#pids[@]})); do
    sleep 0.2 || true # Ctrl-C ends it
    if [[ $deadline ]] && ((SECONDS >= deadline)); then send KILL; fi
    for i in "${!pids[@]}"; do
        if kill -0 "${pids[$i]}" 2>/dev/null; then continue; fi
        wait "${pids[$i]}" && status=0 || status=$?
        unset "pids[$i]"
        rank "$status" && if ((rank > worst)); then code=$status worst=$rank; fi
        if ((status == 0)); then continue; fi
        echo "process $i ended with exit code $status" >&2 || true
        deadline=${deadline:-$((SECONDS + grace))}
        if ((!ending && ${#pids[@]})); then ending=1 && send TERM; fi
    done
done
exit "$code"
