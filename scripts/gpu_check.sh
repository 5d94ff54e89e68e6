#!/usr/bin/env bash
# What only a GPU can show of this checkout, in less than eight minutes on an H100 with 16 cores: the tests marked gpu,
# datasets made twice and by several processes, whose bytes must be equal, and the benchmark in one and in several.
#
#     scripts/gpu_check.sh FOLDER [WHEELS]
#
# FOLDER gets gpu-check.json, which is written after each step. WHEELS is a folder filled by scripts/gpu_wheels.sh, for a
# machine without a network; they are installed for this run alone. The exit code is 1 where a step failed, was stopped
# at its time limit or was not reached. Without a GPU the same runs on the CPU: there the tests are skipped, which counts
# as passed, and "gpu" is null in the file. What is measured can be set in the environment:
: "${WORKLOAD:=resnet50}" "${VARIANTS:=bf16-eager bf16 bf16-signs}"
: "${CONTENDERS:=ours bound torchattacks}" "${LIMIT:=4096}" "${PEER_IMAGES:=768}" "${BATCH_SIZE:=256}"
: "${PROCESSES:=4}" # that share the GPU, each with an interpreter of its own
: "${TOTAL_SECONDS:=465}" # for all steps together
set -uo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: ${0##*/} FOLDER [WHEELS]" >&2
    exit 2
fi
mkdir -p "$1" && folder=$(cd "$1" && pwd) || exit
wheels=${2-}
if [ -n "$wheels" ]; then wheels=$(cd "$wheels" && pwd) || exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
scratch=$(mktemp -d)
export TMPDIR=$scratch HF_HOME=$scratch/hub HF_HUB_OFFLINE=1
# This checkout, whatever is installed.
export PYTHONPATH=$PWD:$scratch/site${PYTHONPATH:+:$PYTHONPATH}

child="" failed=0
report() {
    python scripts/gpu_report.py report "$scratch" "$folder/gpu-check.json"
}
trap 'report; rm -rf "$scratch"' EXIT
trap 'if [ -n "$child" ]; then kill "$child" 2>/dev/null; wait "$child"; fi; exit 130' INT TERM

# step NAME SECONDS COMMAND...: for so long at most, and for no longer than is left of the time for all.
step() {
    local name=$1 limit=$2 left=$((TOTAL_SECONDS - SECONDS)) began=$SECONDS status
    shift 2
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    : >"$scratch/$name.log"
    if [ "$limit" -gt 0 ]; then
        echo "$name: for $limit s at most" >&2
        timeout --kill-after=5 "$limit" "$@" >"$scratch/$name.log" 2>&1 &
        child=$!
        wait "$child"
        status=$? child=""
    else
        status=not-reached
    fi
    echo "$name $status $((SECONDS - began)) $limit" >>"$scratch/steps"
    report
    if [ "$status" != 0 ]; then
        failed=1
        echo "$name ended with $status after $((SECONDS - began)) s" >&2
        tail -n 20 "$scratch/$name.log" >&2
    fi
    [ "$status" = 0 ]
}

# twice NAME CONFIG: make a dataset two times, and compare the digests of the Parquet files.
twice() {
    local name=$1 config=$2 turn
    shift 2
    for turn in 1 2; do
        step "$name-$turn" 75 python -m pipeline generate "$config" "$@" --output "$scratch/$name/$turn" || return
    done
    # shellcheck disable=SC2016
    step "$name-equal" 20 bash -euo pipefail -c 'cd "$0/1"; find . -name "*.parquet" -exec sha256sum {} + | tee "$0.digests"
        cd ../2; sha256sum --check --quiet --strict "$0.digests"' "$scratch/$name"
    rm -rf "${scratch:?}/$name"
}

# shared NAME CONFIG: make the dataset of `twice` once more, by several processes.
shared() {
    local name=$1 config=$2
    step "$name-shared" 75 python -m pipeline generate "$config" --output "$scratch/$name-shared" \
        --set "runtime.processes=$PROCESSES" || return
    # shellcheck disable=SC2016
    step "$name-shared-equal" 20 bash -c 'cd "$0-shared" && sha256sum --check --quiet --strict "$0.digests"' "$scratch/$name"
    rm -rf "${scratch:?}/$name-shared"
}

touch "$scratch/steps"
options=()
for contender in $CONTENDERS; do options+=(--contender "$contender"); done
if [ -n "$wheels" ]; then
    step install 60 python -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" "$wheels"/*.whl
fi
step prepare 90 python scripts/gpu_report.py prepare "$scratch" --workload "$WORKLOAD" --variant "${VARIANTS%% *}" \
    --batch-size "$BATCH_SIZE" --images "$LIMIT" "${options[@]}" || exit
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | sort)
# Without the plugins that happen to be installed.
step tests 120 env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python -m pytest -m gpu -q -rs -p pytest_timeout -p no:cacheprovider \
    "${files[@]}"
twice attacks digits-ensemble --limit $((LIMIT / 4)) --set 'attacks.pgd={kind: pgd, epsilons: [32/255]}'
twice workload "$scratch/workload.json"
shared workload "$scratch/workload.json"
for variant in $VARIANTS; do options+=(--variant "$variant"); done
for count in 1 "$PROCESSES"; do options+=(--processes "$count"); done
options+=(--limit "$LIMIT" --peer-images "$PEER_IMAGES" --batch-size "$BATCH_SIZE" --json "$scratch/benchmark.json")
step benchmark "$TOTAL_SECONDS" python scripts/benchmark.py --workload "$WORKLOAD" --rounds 1 "${options[@]}"
exit "$failed"
