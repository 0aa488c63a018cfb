#!/usr/bin/env bash
# From a fresh clone to a trained, validated, exported diffusion language model, in minutes on two CPU cores.
#
#     bash examples/quickstart.sh                                              tensor parallel over two processes
#     bash examples/quickstart.sh --parallel.pipeline-model-parallel-size 2    pipeline parallel instead
#     bash examples/quickstart.sh --parallel.tensor-model-parallel-size 1      data parallel instead
#     bash examples/quickstart.sh --input ~/notes --input more.jsonl           files, folders or .jsonl of your own
#     bash examples/quickstart.sh --training.train-steps 2000                  any setting of the recipe
#
# Starts where an earlier start stopped: environment, corpus and training are reused. Other settings are another run.
set -euo pipefail
inputs=() settings=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        --input) inputs+=("$(realpath -- "${2:?--input needs a file or folder}")"); shift 2 ;;
        *) settings+=("$1"); shift ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

setup_env hf
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Two processes, or one where there is a single GPU. They share each layer unless another layout is asked for.
processes=$(python -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')
case "${settings[*]-}" in *model[-_]parallel[-_]size*) tensor=1 ;; *) tensor=$processes ;; esac

# A run is named by what was asked for, so that asking again finds it.
recipe=examples/recipes/quickstart.py
name=quickstart
[ ${#inputs[@]} -eq 0 ] || name=quickstart-$(printf '%s\n' "${inputs[@]}" | cksum | cut -d' ' -f1)
corpus=data/$name
run=runs/$name
for setting in "${settings[@]}"; do run=$run-${setting#--}; done

say "1/5  corpus and tokenizer, in $corpus"
python -m megadiff prepare --output-dir "$corpus" --vocab-size 2048 --validation-fraction 0.04 \
    ${inputs[@]:+--input "${inputs[@]}"}

say "2/5  training and validation on $processes process(es), in $run"
torchrun --standalone --nproc-per-node "$processes" -m megadiff train "$recipe" --run-dir "$run" \
    --data.path "$corpus" --parallel.tensor-model-parallel-size "$tensor" "${settings[@]}"

say "3/5  a sample"
python -m megadiff generate "$run" --prompt "def " --length 96 --num-denoising-steps 96

say "4/5  export to Hugging Face format"
python -m megadiff convert "$run" "$run/hf" --overwrite

say "5/5  done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
cat <<DONE

The run is in $run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/ and the exported model in hf/.

What to try next${VIRTUAL_ENV:+ (after: source ${VIRTUAL_ENV#"$PWD/"}/bin/activate)}:
  megadiff generate $run --prompt "import "
  megadiff preview $recipe                  what the noise does to the data
  megadiff train $recipe --help-config      every setting of a run
  tensorboard --logdir runs                                       the curves
  bash examples/quickstart.sh --objective.noise masked            another noise, everything else the same
DONE
