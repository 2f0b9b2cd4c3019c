#!/usr/bin/env bash
# rewrite requirements/lock.txt from the packages of .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lock=requirements/lock.txt
{
    grep '^#' "$lock"
    .venv/bin/pip freeze --all --exclude-editable |
        grep -viE '^(pip|wheel|torch|torchvision|sglang|triton|nvidia-[^=]*)=='
} >"$lock.new"
if grep -n ' @ ' "$lock.new"; then
    echo "lock: a package above was installed from a path or an address; install it by version first" >&2
    rm "$lock.new"
    exit 1
fi
mv "$lock.new" "$lock"
