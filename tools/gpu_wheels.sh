#!/usr/bin/env bash
# Fill a folder with the wheels that a GPU machine without a package registry needs beside an image that has Python 3.12,
# torch, Triton and Transformers (and what those bring, NumPy, SciPy, OpenCV, pytest), at the versions of constraints.txt.
#
# usage: tools/gpu_wheels.sh [FOLDER]    (default .wheels, which git ignores; run in the root of the checkout)
# environment: PYTHON (python3), whose pip fetches and builds
set -euo pipefail

readonly folder=${1:-.wheels} python=${PYTHON:-python3}
readonly most=$((64 << 20)) # bytes that travel, with the checkout
# What is published as source only; both are built without a compiler.
readonly sources=(deepspeed antlr4-python3-runtime)
readonly wheels=(
    megatron-core hydra-core omegaconf submitit hydra-submitit-launcher
    pydantic pydantic_core typing-inspection annotated-types hjson
    soundfile cffi pycparser av webdataset braceexpand
    jiwer RapidFuzz gguf
)

pinned() { # NAME... -> NAME==VERSION...
    local name
    for name in "$@"; do
        grep -E "^$name==" constraints.txt || { echo "error: constraints.txt pins no $name" >&2; return 1; }
    done
}
bytes_of() { # sizes on standard input -> their sum
    awk '{ sum += $1 } END { print sum + 0 }'
}

mapfile -t pinned_wheels <<<"$(pinned "${wheels[@]}")"
mapfile -t pinned_sources <<<"$(pinned "${sources[@]}")"

mkdir -p "$folder"
rm -f "$folder"/*.whl
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" --only-binary :all: \
    --implementation cp --python-version 3.12 --abi cp312 --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    "${pinned_wheels[@]}"
# DS_BUILD_OPS=0: DeepSpeed compiles no operator ahead of time.
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" \
    "${pinned_sources[@]}"

for name in "${wheels[@]}" "${sources[@]}"; do
    pattern=${name//-/_}
    find "$folder" -iname "$pattern-*.whl" | grep -q . || { echo "error: no wheel of $name in $folder" >&2; exit 1; }
done
if foreign=$(find "$folder" -name '*.whl' ! -name '*-none-any.whl' ! -name '*-cp312-*' ! -name '*-abi3-*' \
    ! -name '*-none-manylinux*' | grep .); then
    echo "error: not for Python 3.12 on x86-64 Linux: $foreign" >&2
    exit 1
fi
in_wheels=$(find "$folder" -name '*.whl' -printf '%s\n' | bytes_of)
in_checkout=$(git ls-files -z | xargs -0 stat --format %s | bytes_of)
total=$((in_wheels + in_checkout))
printf '%d wheels, %.1f MiB; checkout %.1f MiB; together %.1f of at most %d MiB\n' \
    "$(find "$folder" -name '*.whl' | wc -l)" "$(bc -l <<<"$in_wheels / 2^20")" "$(bc -l <<<"$in_checkout / 2^20")" \
    "$(bc -l <<<"$total / 2^20")" $((most >> 20))
((total <= most)) || { echo "error: more than can travel" >&2; exit 1; }
echo "On the GPU machine, in the root of the checkout:"
echo "    python3 -m pip install --no-index --no-deps $folder/*.whl && python3 -m tools.gpu_suite"
