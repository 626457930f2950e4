#!/usr/bin/env bash
# LoRAShear on a GPU: the memory of a shearing step on a 7B shape, then SmolLM2 sheared with 20M tokens beside rows that are pruned at
# once and recovered on as many, perplexity of whole texts and the seven zero-shot tasks (needs fxprune[demo,eval]). From the
# repository's root:
#
#     bash benchmarks/gpu/shear.sh MODEL.gguf DATA OUT [options of python -m benchmarks.paper.lorashear]
#
# Rows are in OUT/lorashear.json as they come, checkpoints in OUT/shear, and the same command goes on where it was stopped, within a
# row too. PYTHON names the interpreter. Weights are float32 under bf16 autocast: a step of shrinking is less than bf16 resolves.
set -euo pipefail
model=${1:?a .gguf file, a directory or a hub id} data=${2:?a directory with the texts} out=${3:?where the results go}
shift 3
mkdir -p "$out"
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
if [ ! -e "$out/shear_memory.json" ]; then
    "$python" -m benchmarks.shear_memory --device cuda --output "$out/shear_memory.json"
fi
exec "$python" -m benchmarks.paper.lorashear \
    --model "$model" --data "$data" --work "$out/shear" --output "$out/lorashear.json" --device cuda --windows 0 --batch 64 \
    --rows llm-pruner,kfac-at-once,default-at-once,lorashear,kfac,kfac-no-knowledge,kfac-one-shot,kfac-static \
    --tokens 20000000 --ratios 0.2 0.5 --set precision=bf16 --tasks "$@"
