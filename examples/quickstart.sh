#!/usr/bin/env bash
# From a fresh clone to a trained, validated, exported diffusion language model, in minutes on two CPU cores.
#
#     bash examples/quickstart.sh                                              tensor parallel over two processes
#     bash examples/quickstart.sh --parallel.pipeline-model-parallel-size 2    pipeline parallel instead
#     bash examples/quickstart.sh --parallel.tensor-model-parallel-size 1      data parallel instead
#     bash examples/quickstart.sh --training.train-steps 2000                  any setting of the recipe
#
# Starts where an earlier start stopped: environment, corpus and training are reused. Other settings are another run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

case " $* " in *" --help "* | *" -h "*) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;; esac

setup_env hf
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

recipe=examples/recipes/quickstart.py
corpus=data/quickstart
run=runs/quickstart
for argument in "$@"; do run=$run-${argument#--}; done

# Two processes, or one where there is a single GPU. They share each layer unless another layout is asked for.
processes=$(python -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')
case "$*" in *model-parallel-size* | *model_parallel_size*) tensor=1 ;; *) tensor=$processes ;; esac

say "1/5  corpus and tokenizer: the Python standard library, in $corpus"
python -m megadiff prepare --output-dir "$corpus" --vocab-size 4096

say "2/5  training and validation: $processes processes, in $run"
torchrun --standalone --nproc-per-node "$processes" -m megadiff train "$recipe" --run-dir "$run" \
    --parallel.tensor-model-parallel-size "$tensor" "$@"

say "3/5  a sample"
python -m megadiff generate "$run" --prompt "def " --length 96 --num-denoising-steps 96

say "4/5  export to Hugging Face format"
python -m megadiff convert "$run" "$run/hf" --overwrite

say "5/5  done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
cat <<DONE

The run is in $run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/ and the exported model in hf/.

What to try next${VIRTUAL_ENV:+ (after: source ${VIRTUAL_ENV/#$PWD\//}/bin/activate)}:
  megadiff generate $run --prompt "import "         write something else
  megadiff preview $recipe      see what the noise does to the data
  megadiff train --help                                     every setting of a run
  tensorboard --logdir runs                                 look at the curves
  bash examples/quickstart.sh --objective.noise masked      another noise, same everything else
DONE
