#!/usr/bin/env bash
# make .venv with locked versions: every target of the Makefile runs this first.
# each step leaves a stamp, so an interrupted set-up resumes and a finished one costs milliseconds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sglang=0.5.21
torch=2.13.0
torchvision=0.28.0
venv=.venv
python=$venv/bin/python
stamps=$venv/.setup
log=$venv/setup.log
errors=$venv/setup.err
steps=6
step=0
chain=""
reason=""

refuse() {
    echo "setup: $*" >&2
    exit 2
}

# prints "3.11" when $1 really runs, can make virtual environments, and is a version that we support
supported_version() {
    "$1" -c 'import sys, venv, ensurepip
if sys.version_info[:2] in ((3, 11), (3, 12)): print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# a version manager's shim may be there and not run, so each candidate is tried
find_base() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        [[ -n "$(supported_version "$PYTHON")" ]] ||
            refuse "PYTHON=$PYTHON is not a Python 3.11 or 3.12 with its venv module; point PYTHON at one that is"
        echo "$PYTHON"
        return
    fi
    for candidate in "$python" python3.12 python3.11 python3 python; do
        if [[ -n "$(supported_version "$candidate")" ]]; then
            echo "$candidate"
            return
        fi
    done
    refuse "needs Python 3.11 or 3.12 with its venv module and found none; install one, or name it: make setup PYTHON=/path/to/python3.12"
}

# run_step NAME INPUT COMMAND...: skipped when it ran before with the same input, as did every step before it
run_step() {
    local name=$1 started=$SECONDS
    step=$((step + 1))
    chain=$(printf '%s\n' "$chain" "$@" | sha256sum)
    if [[ -f "$stamps/$step" && "$(<"$stamps/$step")" == "$chain" ]]; then
        return
    fi
    echo "setup: [$step/$steps] $name"
    shift 2
    if ! "$@"; then
        echo "setup: [$step/$steps] failed${reason:+: $reason} (log: $log, $errors; 'make setup' resumes here)" >&2
        exit 1
    fi
    mkdir -p "$stamps"
    echo "$chain" >"$stamps/$step"
    echo "setup: [$step/$steps] took $((SECONDS - started)) s"
}

make_venv() {
    if [[ "$(supported_version "$python")" == "$version" ]] && "$python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    "$base" -m venv --clear "$venv"
}

# pip's progress goes to the terminal, its complaints to a file; the last error is the reason we print.
# a terminal gets pip's own bars, a log of a build only the lines that say something
pip_install() {
    local pip=("$python" -m pip install --disable-pip-version-check --no-input --log "$log")
    : >"$errors"
    if [[ -t 1 ]]; then
        "${pip[@]}" "$@" 2>>"$errors" && return
    else
        "${pip[@]}" "$@" 2>>"$errors" | { grep -E '^ *(Downloading|Installing|Successfully)' || true; } && return
    fi
    reason=$(grep -v '^ *\(WARNING\|DEPRECATION\)' "$errors" | tail -1 | sed 's/^ *ERROR: //' | cut -c1-200)
    return 1
}

# the user's own pip configuration decides which build this is
install_torch() {
    local constraints=(-c requirements/lock.txt)
    [[ $kind == cpu ]] || constraints+=(-c requirements/gpu.txt)
    pip_install "${constraints[@]}" "torch==$torch"
}

# --no-deps, for the lists are complete and nothing else, CUDA packages above all, is to come in
install_lock() {
    local lists=(-r requirements/lock.txt)
    if [[ $kind == gpu ]]; then
        lists+=(-r requirements/gpu.txt)
    elif [[ "$("$python" -c 'from importlib.metadata import version as v; print(v("torch"))')" == *+cpu ]]; then
        lists+=(-r requirements/cpu.txt)
    fi
    pip_install --no-deps "${lists[@]}"
}

install_sglang() { pip_install --no-deps "sglang==$sglang" "torchvision==$torchvision"; }

install_project() { pip_install --no-deps --no-build-isolation -e .; }

verify() {
    : >"$errors"
    "$python" scripts/verify_setup.py "$kind" "$sglang" "$torch" 2>>"$errors" && return
    reason=$(tail -1 "$errors")
    return 1
}

[[ "$(uname -sm)" == "Linux x86_64" ]] || refuse "runs on Linux x86-64 only, and this is $(uname -sm)"

# the short cut looks for the driver's tool, and does not start it
driver=$(command -v nvidia-smi || true)
inputs=$(cat requirements/*.txt pyproject.toml scripts/setup.sh scripts/verify_setup.py | sha256sum)
finished="$inputs $driver"
if [[ -z "${PYTHON:-}" && -x $python && -f $stamps/finished && "$(<"$stamps/finished")" == "$finished" ]]; then
    exit 0
fi

# one set-up at a time in one checkout
exec 9<scripts/setup.sh
if command -v flock >/dev/null; then flock 9; fi

kind=cpu
if [[ -n "$driver" ]] && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    kind=gpu
fi
base=$(find_base)
version=$(supported_version "$base")
locked=$(cat requirements/*.txt | sha256sum)

run_step "virtual environment with Python $version in $venv" "$version" make_venv
run_step "torch $torch for this machine ($kind)" "$kind $torch $locked" install_torch
run_step "locked packages" "$locked" install_lock
run_step "SGLang $sglang" "$sglang $torchvision" install_sglang
run_step "hip-sglang itself, editable" "$(sha256sum pyproject.toml)" install_project
run_step "check of the result" "$kind $(sha256sum scripts/verify_setup.py)" verify
echo "$finished" >"$stamps/finished"
