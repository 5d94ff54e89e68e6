#!/usr/bin/env bash
# The wheels that scripts/gpu_check.sh needs on a machine with a GPU and no network.
#
#     scripts/gpu_wheels.sh FOLDER [PACKAGE...]
#
# For Python 3.12 on Linux x86_64, whatever runs here; into an empty FOLDER, as of two versions of a package neither is
# installed. The machine has torch, torchvision and what is usual beside them: NumPy, pandas, pyarrow, Pillow, Matplotlib,
# scikit-learn, jinja2, PyYAML, tqdm, psutil, safetensors, requests, aiohttp, xxhash. What it lacks of these is named after
# FOLDER and comes without its dependencies.
set -euo pipefail
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: ${0##*/} FOLDER [PACKAGE...]" >&2
    exit 2
fi
folder=$1
shift
target=(--only-binary=:all: --python-version 3.12 --implementation cp)
# pip takes a wheel for an older glibc only where it is named.
for glibc in 2_28 2_27 2_24 2_17 2_12 2_5; do target+=(--platform "manylinux_${glibc}_x86_64"); done
target+=(--platform manylinux2014_x86_64)
python -m pip download -q -d "$folder" "${target[@]}" huggingface_hub pydantic typer pytest pytest-timeout hypothesis
# Their dependencies are torch, or there.
python -m pip download -q -d "$folder" "${target[@]}" --no-deps datasets dill imagecodecs multiprocess torchattacks "$@"
du -ch "$folder"/*.whl
