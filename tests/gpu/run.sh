#!/usr/bin/env bash
# The GPU parts on this machine: from a kit (make gpu-kit), or in a checkout. See python -m tests.gpu.runner --help.
#   bash tests/gpu/run.sh [--device cuda|cpu] [--only PART …] [--minutes M] [--out DIR]
#   PYTHON=/path/to/python bash tests/gpu/run.sh    # the Python that has torch; default: python3
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
kit=$root # the kit is this folder itself, or lies in the checkout
[ -d "$kit/wheels" ] || kit=$root/gpu-kit

fail() {
  echo "tests/gpu: $*" >&2
  exit 2
}

if [ -z "${PYTHON:-}" ] && [ ! -d "$kit/wheels" ] && [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; fi
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "there is no $python here. PYTHON=/path/to/python names the Python that has torch."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$python" --version 2>&1) is too old: distloop needs 3.11 or newer. PYTHON=/path/to/python names another one."

path=$root
if [ -d "$kit/wheels" ]; then
  # Into a folder of their own, which the runner removes: the machine's environment stays as it is. --isolated: with no
  # constraints or options of the machine's either.
  GPU_PACKAGES=$(mktemp -d "${TMPDIR:-/tmp}/distloop-gpu-packages-XXXXXX")
  export GPU_PACKAGES
  trap 'rm -rf "$GPU_PACKAGES"' EXIT
  "$python" -m pip --isolated --disable-pip-version-check install --quiet --no-index --no-deps --no-compile \
    --root-user-action ignore --target "$GPU_PACKAGES" "$kit"/wheels/*.whl ||
    fail "the wheels in $kit/wheels could not be installed. They are for one version of Python, and this is" \
      "$("$python" --version 2>&1): make gpu-kit GPU_PYTHON=3.x packs those for another one."
  path=$root:$GPU_PACKAGES
fi
[ ! -e "$kit/data/digits.npz" ] || export GPU_DATA=$kit/data
# -P: not the `tests` of the folder where this is typed. exec: signals reach the runner.
PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} exec "$python" -P -m tests.gpu.runner "$@"
