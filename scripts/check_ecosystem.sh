#!/usr/bin/env bash
# Tidemill inside lm-evaluation-harness, HELM and Ray, really installed from PyPI: into .cache/ecosystem and .cache/helm.
# Needs some 8 GB of disk (torch is what the harness's own backend runs on, as the oracle) and a few minutes.
# TIDEMILL_BIN names another program than the one built here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/parts.sh

build() {
    cargo build --release --locked
}
export TIDEMILL_BIN=${TIDEMILL_BIN:-$PWD/target/release/tidemill}

# install NAME PACKAGE...: an environment below .cache/ with packages and the adapters.
install() {
    local environment=.cache/$1
    shift
    [ -d "$environment" ] || python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet "$@"
    "$environment/bin/pip" install --quiet --no-deps --force-reinstall ./python
}

# A task as people start it.
lm_eval_command() {
    .cache/ecosystem/bin/tidemill-lm-eval --model tidemill --model_args model=demo,progress=none \
        --tasks tidemill_labelling --include_path examples/lm-eval --limit 20 --output_path .cache/lm-eval
}

python() {
    ".cache/$1/bin/python" "${@:2}"
}

if [ "$TIDEMILL_BIN" = "$PWD/target/release/tidemill" ]; then
    part "build" build
fi
part "install lm-eval, Ray" install ecosystem lm_eval torch transformers accelerate "ray[data]" rouge_score
part "install HELM" install helm crfm-helm
part "lm-eval" python ecosystem scripts/ecosystem/check_lm_eval.py
part "lm-eval, command" lm_eval_command
part "HELM" python helm scripts/ecosystem/check_helm.py
part "HELM and ROUGE vectors" python helm scripts/ecosystem/make_vectors.py --check
part "Ray" python ecosystem scripts/ecosystem/check_ray.py
summary
