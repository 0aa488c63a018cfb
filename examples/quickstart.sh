#!/usr/bin/env bash
# From a fresh clone to a trained, validated, exported diffusion language model, in minutes on two CPU cores.
#
#     bash examples/quickstart.sh                                              tensor parallel over two processes
#     bash examples/quickstart.sh --parallel.pipeline-model-parallel-size 2    pipeline parallel instead
#     bash examples/quickstart.sh --parallel.tensor-model-parallel-size 1      data parallel instead
#     bash examples/quickstart.sh --input ~/notes --input more.jsonl           files, folders or .jsonl of your own
#     bash examples/quickstart.sh --input poem.txt --vocab-size 300            little text needs a small vocabulary
#     bash examples/quickstart.sh --training.train-steps 2000                  any setting of the recipe
#
# --validation-fraction F keeps that share of the text for validation. Starts where an earlier start stopped:
# environment, corpus and training are reused. Other settings are another run.
set -euo pipefail
checkout=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")/..")
# shellcheck source=tools/setup_env.sh
source "$checkout/tools/setup_env.sh"
# shellcheck source=tools/run_state.sh
source "$checkout/tools/run_state.sh"

recipe=examples/recipes/quickstart.py
name=quickstart
again="bash examples/quickstart.sh" inputs=() corpus_options=() settings=()
while [ $# -gt 0 ]; do
    case $1 in # --option=value is --option value
        --input=* | --vocab-size=* | --validation-fraction=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        --help-config) die "list the settings by: python -m megadiff train $recipe --help-config" ;;
        --run-dir* | --data.path*) die "${1%%=*} is chosen by this script, which names a run by its settings" ;;
        --input)
            [ -e "${2:-}" ] || die "--input '${2:-}' does not exist: give a file or a folder"
            inputs+=("$(realpath -- "$2")")
            again+=$(printf ' --input %q' "${inputs[-1]}")
            shift 2
            ;;
        --vocab-size | --validation-fraction)
            [ -n "${2:-}" ] || die "$1 has no value: give one as $1 VALUE"
            corpus_options+=("$1" "$2")
            name=$name-${1#--}-$2
            again+=$(printf ' %q' "$1" "$2")
            shift 2
            ;;
        *) settings+=("$1"); again+=$(printf ' %q' "$1"); shift ;;
    esac
done
cd "$checkout"

# torchrun without its traceback: the ranks have said what there is to say, and the first to fail gives the exit code.
launch() {
    python -c '
import sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main(sys.argv[1:])
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else 128 - code)
except SignalException:
    sys.exit(130)
' --standalone --nproc-per-node "$processes" "$@"
}

setup_env hf
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A misspelt setting is better known before minutes are spent on the corpus.
python -m megadiff train "$recipe" --help-config ${settings[@]+"${settings[@]}"} >/dev/null

# Two processes, or one where there is a single GPU. They share each layer unless another layout is asked for.
processes=$(python -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')
case "${settings[*]-}" in *model[-_]parallel[-_]size*) tensor=1 ;; *) tensor=$processes ;; esac

# A run is named by what was asked for, so that asking again finds it.
[ ${#inputs[@]} -eq 0 ] || name=$name-$(printf '%s\n' "${inputs[@]}" | cksum | cut -d' ' -f1)
corpus=data/$name
for setting in ${settings[@]+"${settings[@]}"}; do name=$name-${setting#--}; done
name=${name//[^[:alnum:].=_-]/_}
[ ${#name} -le 200 ] || name=${name:0:180}-$(cksum <<<"$name" | cut -d' ' -f1)
run=runs/$name

say "1/5  corpus and tokenizer, in $corpus"
python -m megadiff prepare --output-dir "$corpus" --vocab-size 2048 --validation-fraction 0.04 \
    ${corpus_options[@]+"${corpus_options[@]}"} ${inputs[@]+--input "${inputs[@]}"}

say "2/5  training and validation on $processes process(es) of $OMP_NUM_THREADS thread(s), in $run"
status=0
launch -m megadiff train "$recipe" --run-dir "$run" --data.path "$corpus" \
    --parallel.tensor-model-parallel-size "$tensor" ${settings[@]+"${settings[@]}"} || status=$?
if [ $status -eq 0 ] && ! complete "$run"; then status=130; fi
[ $status -ne 130 ] || say "stopped; start again to go on"
[ $status -eq 0 ] || exit $status

say "3/5  a sample"
python -m megadiff generate "$run" --prompt "def " --length 96 --num-denoising-steps 96

say "4/5  export to Hugging Face format"
python -m megadiff convert "$run" "$run/hf" --overwrite

say "5/5  done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
environment=${VIRTUAL_ENV:+${VIRTUAL_ENV#"$PWD/"}/bin/activate}
cat <<DONE

The run is in $run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/ and the exported model in hf/.

What to try next (after: cd $(printf %q "$PWD")${environment:+; source $(printf %q "$environment")}):

  # more text
  megadiff generate $run --prompt "import "
  # the curves of all runs
  tensorboard --logdir runs
  # what the noise does to the data
  megadiff preview $recipe --data.path $corpus
  # every setting of a run
  megadiff train $recipe --help-config
  # another noise, everything else the same
  $again --objective.noise masked
DONE
