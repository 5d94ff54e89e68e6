#!/usr/bin/env bash
# A run that nobody watches: generate, verify, report and, where a repository is named, publish.
#
#     scripts/overnight.sh CONFIG [REPO_ID]
#     nohup scripts/overnight.sh cifar10.yaml user/name &
#
# CONFIG is what `fgsm generate` takes. Everything that is said goes, with times, to overnight-CONFIG.log in the working
# folder. The exit code is 0, or that of the first step that failed, and no step follows it: 3 says that some shards of a
# run on a cluster failed, 130 and 143 that it was interrupted. Run it again: it goes on where it stopped.
set -uo pipefail
# A step gets a process group of its own, so that Ctrl-C reaches it once, through us.
set -m

if [ $# -lt 1 ] || [ $# -gt 2 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: ${0##*/} CONFIG [REPO_ID]" >&2
    exit 2
fi
config=$1 repository=${2-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v python3 || command -v python)
if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
# This checkout, whatever is installed.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
name=${config##*/}
log=$PWD/overnight-${name%.y*ml}.log

step="" interrupted=""
interrupt() {
    interrupted=$1
    if [ -n "$step" ]; then kill -s "$2" "$step" 2>/dev/null; fi
}
trap 'interrupt 130 INT' INT
trap 'interrupt 143 TERM' TERM

say() {
    echo "$(date '+%Y-%m-%d %H:%M:%S') $*" | tee -a "$log"
}

run() {
    if [ -n "$interrupted" ]; then exit "$interrupted"; fi
    local began=$SECONDS code
    say "fgsm $*"
    "$python" -m pipeline "$@" </dev/null >>"$log" 2>&1 &
    step=$!
    wait "$step"
    code=$?
    # A signal ends the waiting, not the step.
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
        code=$?
    done
    step=""
    if [ $code -ne 0 ]; then
        say "fgsm $1 ended with $code after $((SECONDS - began)) s: $(tail -n 1 "$log")"
        exit $code
    fi
    say "fgsm $1 took $((SECONDS - began)) s"
}

echo "log: $log"
run generate "$config"
output=$("$python" -c 'import sys; from pipeline.config.load import load_config; print(load_config(sys.argv[1]).output.path)' \
    "$config" 2>>"$log") || exit
# A path may begin with ~.
output=${output/#\~\//$HOME/}
run verify "$output" --recompute
run report "$output"
if [ -n "$repository" ]; then run publish "$output" "$repository"; fi
say "done: $output"
