#!/usr/bin/env bash
# All parts on a machine with one GPU within ten minutes: each in a process of its own, so that none can take the others down, and
# with a time limit. Rows that were known by then are in OUT/gpu.json. From the repository's root:
#
#     bash benchmarks/gpu/run.sh OUT [options of python -m benchmarks.gpu]
#
# PYTHON names the interpreter (default: python3). Wheels in .whl/ are installed first, beside what is there, without the network.
set -uo pipefail
out=${1:?where the results go}
shift
mkdir -p "$out"
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
if compgen -G '.whl/*.whl' >/dev/null; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl || exit
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
status=0
for part in importance:110 latency:130 recovery:330; do
    timeout "${part#*:}" "$python" -m benchmarks.gpu --parts "${part%:*}" --output "$out/gpu.json" "$@" 2>&1 | tee -a "$out/gpu.log"
    done=$?
    if [ "$done" -ne 0 ]; then
        echo "${part%:*} ended with $done (124: out of time)" | tee -a "$out/gpu.log"
        status=$done
    fi
done
exit "$status"
