# shellcheck shell=bash
# Sourced by examples/quickstart.sh and examples/pretrain_dlm.sh: what a run directory tells a shell.

# Whether the newest checkpoint of the run directory $1 is that of the last step: a run that was asked to stop ends with
# exit code 0, too.
complete() {
    local train_steps checkpoints
    train_steps=$(sed -n 's/^  train_steps: //p' "$1/config.yaml")
    checkpoints=("$1"/checkpoints/step_*[0-9]) # not those that are being written
    [ "$((10#${checkpoints[-1]##*_}))" -ge "$train_steps" ]
}
