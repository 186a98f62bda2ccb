#!/usr/bin/env bash
# Make a virtual environment with mome_dist (editable), its pinned dependencies and the test tools.
#
# usage: tools/setup_environment.sh VENV [EXTRAS]    (run in the root of the checkout; EXTRAS as pip has them, a,b)
# environment: PYTHON (python3), TORCH_PIP_ARGS (extra pip arguments for torch alone, such as an index of CPU builds)
set -euo pipefail

readonly venv=$1
readonly pip=("$venv/bin/python" -m pip --disable-pip-version-check)

[[ -x "$venv/bin/python" ]] || "${PYTHON:-python3}" -m venv "$venv"

# torch goes first and alone, so that the user chooses its build (CPU or CUDA). Its exact version, local suffix such as
# +cpu included, then constrains everything else: pip cannot swap it for another build.
torch_pin=$(grep -E '^torch==' constraints.txt)
read -r -a torch_args <<<"${TORCH_PIP_ARGS:-}"
"${pip[@]}" install --constraint constraints.txt "${torch_args[@]}" "$torch_pin"

torch_constraint=$(mktemp)
trap 'rm -f "$torch_constraint"' EXIT
"${pip[@]}" freeze | grep -E '^torch==' >"$torch_constraint"

# wandb is what a new version breaks without a word: seconds to install, and a test runs it offline.
extras=${2:-train,prepare,test,docs,espeak,wandb}
# torch's CUDA builds bring the Triton that they are made for, its CPU builds none; the tests need one.
if "${pip[@]}" show torch | grep '^Requires:.*triton' >/dev/null; then
    extras+=,gpu
elif [[ ",$extras," == *,test,* ]]; then
    extras+=,interpreter
fi

# DS_BUILD_OPS=0: DeepSpeed compiles no operator ahead of time, so neither a compiler nor CUDA is needed.
DS_BUILD_OPS=0 "${pip[@]}" install --constraint constraints.txt --constraint "$torch_constraint" \
    --editable ".[$extras]"
"${pip[@]}" check
