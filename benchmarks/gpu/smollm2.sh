#!/usr/bin/env bash
# SmolLM2 pruned by 20 %, recovered with the paper's 50k-sample recipe to its end, and evaluated in full: perplexity of whole texts
# and the seven zero-shot tasks (needs fxprune[demo,eval]). From the repository's root:
#
#     bash benchmarks/gpu/smollm2.sh MODEL.gguf DATA OUT [options of python -m benchmarks.paper.criteria]
#
# Rows are in OUT/smollm2.json as they come, and the same command goes on where it was stopped. PYTHON names the interpreter.
# Alpaca has 51,974 usable rows, of which the recipe holds 2,000 out; --recover is no limit here, the recipe's two epochs are.
set -euo pipefail
model=${1:?a .gguf file, a directory or a hub id} data=${2:?a directory with the texts} out=${3:?where the results go}
shift 3
mkdir -p "$out"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -m benchmarks.paper.criteria \
    --model "$model" --data "$data" --output "$out/smollm2.json" --device cuda --dtype bfloat16 --windows 0 --batch 64 \
    --rows element1,default --ratios 0.2 --recover 1000000000 --recover-recipe llm-pruner --tasks "$@"
