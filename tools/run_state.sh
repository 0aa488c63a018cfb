# shellcheck shell=bash
# Sourced by examples/quickstart.sh and examples/pretrain_dlm.sh: what a run directory tells a shell.

# The step of the newest checkpoint of the run directory $1, or nothing.
newest_checkpoint() {
    local checkpoints=("$1"/checkpoints/step_*[0-9]) # not those that are being written
    if [ -d "${checkpoints[-1]}" ]; then echo "${checkpoints[-1]##*_}"; fi
}

# Whether it is that of the last step: a run that was asked to stop ends with exit code 0, too.
complete() {
    local train_steps newest
    train_steps=$(sed -n 's/^  train_steps: //p' "$1/config.yaml" 2>/dev/null) || return
    newest=$(newest_checkpoint "$1")
    [ -n "$newest" ] && [ "$((10#$newest))" -ge "$train_steps" ]
}
