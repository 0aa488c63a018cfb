"""The command line as a user meets it: wrong input gives one sentence and exit code 2."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from distributed import run_ranks
from tiny import tiny_config

from megadiff import cli, commands
from megadiff.cli import main
from megadiff.config import TrainConfig, load_recipe
from megadiff.exit_codes import EXIT_NO_DATA, EXIT_NON_FINITE, EXIT_USAGE
from megadiff.integrity import write_manifest, write_synced
from megadiff.objectives import GiddConfig


@pytest.fixture
def recipe(tmp_path: Path, corpus_dir: Path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(
        f"from pathlib import Path\nfrom tiny import tiny_config\n\n\ndef config():\n"
        f"    return tiny_config(Path({str(corpus_dir)!r}))\n"
    )
    return path


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail: exit code 2 and one sentence on stderr."""
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer.learning-rate", "1"], "unknown option --optimizer.learning-rate: did you mean --optimizer."),
        (["--objective", "gid"], "unknown objective gid: did you mean gidd?"),
        (["--training.train-steps", "ten"], "--training.train-steps is 'ten', but must be an integer"),
        (["--training.precision", "fp64"], "must be one of bf16, fp32"),
        (["--training.global-batch-size", "7"], "global_batch_size 7 is not a multiple of training.micro_batch_size 2"),
        (["--training.micro-batch-size", "0"], "training.micro_batch_size is 0"),
        (["--training.hang-timeout", "2m"], "must be below parallel.timeout_minutes 2, after which"),
        (["--model.num-attention-heads", "5"], "does not divide into model.num_attention_heads 5"),
        (["--parallel.tensor-model-parallel-size", "2"], "1 process(es) cannot hold"),
        (["--objective.scale", "2"], "objective.scale is 2.0"),
        (["--objective.min-log-snr", "9"], "min_log_snr"),
        (["--validation.num-sequences", "1"], "validation.num_sequences is 1"),
        (["--model.num-query-groups", "0"], "model.num_query_groups is 0, but must be at least 1"),
        (["--model.init-std", "nan"], "model.init_std is nan"),
        (["--optimizer.adam-beta2", "1.5"], "optimizer.adam_beta2 is 1.5, but must lie in [0, 1)"),
        (["--parallel.timeout-minutes", "0"], "parallel.timeout_minutes is 0.0"),
        (["--training.seed", "-1"], "training.seed is -1"),
        (["--validation.interval", "-1"], "validation.interval is -1"),
        (["--checkpoint.keep-last", "-1"], "checkpoint.keep_last is -1"),
        (["--data.path", "nowhere"], "corpus nowhere"),
        (["--data.sequence-length", "1000000"], "sequence_length"),
    ],
)
def test_train_refuses(
    recipe: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert message in error_of(["train", str(recipe), "--run-dir", str(run_dir), *options], capsys)
    assert not (run_dir / "checkpoints").exists()


def test_verify_names_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, tokenizer in ((2, b"abc"), (4, b"xyz")):
        checkpoint = tmp_path / "checkpoints" / f"step_{step:08d}"
        (checkpoint / "state").mkdir(parents=True)
        write_manifest(
            checkpoint, {"step": step}, {"tokenizer.model": write_synced(checkpoint / "tokenizer.model", b"abc")}
        )
        (checkpoint / "tokenizer.model").write_bytes(tokenizer)
    assert main(["verify", str(tmp_path / "checkpoints" / "step_00000002")]) == 0
    assert capsys.readouterr().out.endswith("step_00000002: good\n")
    assert main(["verify", str(tmp_path)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("step_00000002: good")
    assert second.endswith("step_00000004: damaged: tokenizer.model does not have its SHA-256")
    (checkpoint / "manifest.json").write_text("{")
    assert main(["verify", str(checkpoint)]) == 1
    assert "manifest.json cannot be read" in capsys.readouterr().out
    assert "neither a checkpoint" in error_of(["verify", str(tmp_path / "nothing")], capsys)


def test_train_refuses_damaged_corpora(
    recipe: Path, corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(corpus_dir, damaged)
    with (damaged / "train.bin").open("r+b") as stream:
        stream.truncate(1001)
    options = ["--run-dir", str(tmp_path / "run"), "--data.path", str(damaged)]
    assert "train.bin has 1001 bytes" in error_of(["train", str(recipe), *options], capsys)

    shutil.copy(corpus_dir / "train.bin", damaged / "train.bin")
    manifest = json.loads((damaged / "corpus.json").read_text())
    (damaged / "corpus.json").write_text(json.dumps(manifest | {"mask_id": 400}))
    assert "mask_id must lie in [0, 400), got 400" in error_of(["train", str(recipe), *options], capsys)


def test_wrong_paths_and_commands(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no recipe nothing.py" in error_of(["train", "nothing.py", "--run-dir", "x"], capsys)
    assert "train needs --run-dir" in error_of(["train", str(recipe)], capsys)
    wrong = tmp_path / "wrong.py"
    wrong.write_text("config = 3\n")
    assert "must define a function config()" in error_of(["train", str(wrong), "--run-dir", "x"], capsys)
    assert "invalid choice: 'tran'" in error_of(["tran"], capsys)
    assert "neither a checkpoint" in error_of(["generate", str(tmp_path)], capsys)
    assert "unknown argument --promt" in error_of(["generate", str(tmp_path), "--promt", "x"], capsys)
    assert "--num-samples is 'x', but must be an integer" in error_of(
        ["generate", str(trained_run_stub(tmp_path, recipe)), "--num-samples", "x"], capsys
    )
    assert "no metrics.jsonl" in error_of(["compare", str(tmp_path), str(tmp_path)], capsys)


def trained_run_stub(tmp_path: Path, recipe: Path) -> Path:
    """Just enough of a checkpoint to get past finding it."""
    checkpoint = tmp_path / "stub"
    (checkpoint / "state").mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint / "config.yaml").write_text(load_recipe(recipe).to_yaml())
    return checkpoint


def test_objective_is_replaced_before_the_rest_is_parsed(recipe: Path) -> None:
    config = load_recipe(recipe).overridden(["--objective.shift", "2", "--objective", "gidd"])
    assert config.objective == GiddConfig(shift=2.0)


def test_resolved_configuration_survives_yaml(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe).overridden(["--objective.noise", "masked", "--model.num-query-groups", "2"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config
    broken = yaml.safe_load(config.to_yaml()) | {"modle": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(ValueError, match=r"unknown setting in .*config.yaml modle: did you mean model\?"):
        TrainConfig.from_yaml(tmp_path / "config.yaml")


def test_help_config_lists_every_setting(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--help-config"]) == 0
    shown = re.findall(r"--([\w.-]+) ", capsys.readouterr().out)
    config = load_recipe(recipe)
    for section in dataclasses.fields(config):
        for field in dataclasses.fields(getattr(config, section.name)):
            assert f"{section.name}.{field.name.replace('_', '-')}" in shown


def test_preview_shows_five_levels_in_colour(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["preview", str(recipe), "--first-sample", "3", "--num-samples", "2"]
    assert main([*command, "--colour", "always"]) == 0
    shown = capsys.readouterr().out
    pattern = r"time (0\.\d)   log-SNR [+-]\d+\.\d+   sample (\d)   masked (\d+)   replaced (\d+)   of 32"
    levels = re.findall(pattern, shown)
    assert [level[:2] for level in levels] == [(f"0.{t}", s) for t in (1, 3, 5, 7, 9) for s in ("3", "4")]
    masked, replaced = ([int(level[i]) for level in levels] for i in (2, 3))
    assert masked[::2] == sorted(masked[::2]) and masked[-1] > 16 and sum(replaced) > 0
    assert shown.count("\033[2m░") == sum(masked) and shown.count("\033[31m") == sum(replaced)
    assert main([*command, "--colour", "never"]) == 0
    assert "\033" not in capsys.readouterr().out


def test_evaluate_refuses_text_of_another_tokenizer(
    tmp_path: Path, recipe: Path, corpus_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained_run_stub(tmp_path, recipe)
    (checkpoint / "manifest.json").write_text(json.dumps({"tokenizer_sha256": "another", "vocab_size": 400}))
    message = error_of(["evaluate", str(checkpoint)], capsys)
    assert f"corpus {corpus_dir} was encoded with another tokenizer" in message and "--tokenizer" in message


def test_generate_is_for_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in error_of(["generate", str(tmp_path)], capsys)


def test_other_ranks_speak_only_when_rank_zero_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("megadiff.console.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    assert main(["train", "nothing.py", "--run-dir", "x"]) == 2
    assert waited and "error on rank 3: no recipe nothing.py" in capsys.readouterr().err


def test_recipes_may_define_classes_and_name_what_they_miss(tmp_path: Path) -> None:
    path = tmp_path / "recipe.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom pathlib import Path\n"
        "from tiny import tiny_config\n\n\n@dataclass\nclass Size:\n    layers: int = 3\n\n\n"
        "def config():\n    return tiny_config(Path('x'), model={'num_layers': Size().layers})\n"
    )
    assert load_recipe(path).model.num_layers == 3
    path.write_text("import not_there\n")
    with pytest.raises(ValueError, match=r"recipe .* cannot be imported: No module named 'not_there'"):
        load_recipe(path)


def test_doctor_names_what_is_live(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in (
        "python",
        "torch",
        "megatron-core",
        "CPU kernels",
        "CUDA kernels",
        "gradient accumulation",
        "FusedAdam, apex",
    ):
        assert re.search(rf"^{re.escape(name)} +\S", shown, re.MULTILINE)
    assert re.search(r"^transformer_engine +\S+ \(supported: 2.10 to 2.20\)$", shown, re.MULTILINE)


def test_doctor_fails_where_something_is_required_and_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--require", "cpu"]) == 0
    monkeypatch.setattr("megadiff.ops._library.state", lambda kind: f"eager: torch finds no {kind} device")
    assert main(["doctor", "--require", "cuda"]) == 2
    expected = "error: --require cuda asks for devices and native kernels of this kind, but the operators"
    assert expected in capsys.readouterr().err


def test_doctor_tells_health_by_devices_and_libraries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megadiff.doctor.report", lambda: pytest.fail("everything was asked"))
    assert main(["doctor", "--health", "cpu"]) == main(["doctor", "--require-library", "cpu"]) == 0
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["doctor", "--health", "cuda"]) == 2
    assert "--health cuda asks for GPUs, but torch sees none: start the container with" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("megadiff.ops._library.why_not_loaded", lambda kind: f"no {kind} library: build it")
    for option in ("--health", "--require-library"):
        assert main(["doctor", option, "cuda"]) == 2
        expected = r"error: the native kernels for cuda cannot be used by torch \S+: no cuda library: build it\n"
        assert re.fullmatch(expected, capsys.readouterr().err)


def train_and_use(corpus: Path, run_dir: Path) -> dict[str, object]:
    """Train on two tensor-parallel ranks; returned by each rank: nothing, the files speak."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.loop import train

    config = tiny_config(corpus, parallel={"tensor_model_parallel_size": 2})
    train(config, run_dir, parallel_groups.initialize(config.parallel))
    parallel_groups.shutdown()
    return {}


def use_in_one_process(run_dir: Path) -> list[str]:
    """Evaluate and generate from the command line, in one process; what was printed."""
    import contextlib
    import io

    printed = []
    for arguments in (
        ["evaluate", str(run_dir)],
        ["generate", str(run_dir), "--prompt", "def ", "--length", "20", "--num-denoising-steps", "5"],
        ["generate", str(run_dir), "--prompt", "def ", "--length", "20", "--num-denoising-steps", "5", "--tensorboard"],
        ["generate", str(run_dir), "--length", "20", "--num-denoising-steps", "5", "--num-samples", "2", "--seed", "9"],
    ):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        assert code == 0, err.getvalue()
        printed.append(out.getvalue())
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert main(["generate", str(run_dir), "--prompt", "import " * 30, "--length", "8"]) == 2
    printed.append(err.getvalue())
    return printed


def test_checkpoint_of_two_ranks_is_evaluated_and_sampled_in_one(corpus_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_ranks(2, train_and_use, corpus_dir, run_dir)
    evaluated, first, again, two, too_long = run_ranks(1, use_in_one_process, run_dir)[0]

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    validation = next(line for line in lines if line.get("split") == "validation")
    assert json.loads(evaluated)["nelbo"] == pytest.approx(validation["nelbo"], rel=1e-5)
    assert first.startswith("def ") and first == again
    assert len(first.strip()) > len("def ") and len(two.strip()) > 0 and two != first
    assert re.search(r"the prompt has \d+ tokens, but the canvas has room for 8: raise --length", too_long)

    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 7))
    for name in (
        "consumed_samples",
        "consumed_tokens",
        "nelbo",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "step_time",
    ):
        assert all(name in line for line in training)
    assert {"step", "split", "nelbo", "nelbo_stderr", "bits_per_byte"} <= validation.keys()
    pages = [path.read_bytes() for path in (run_dir / "tensorboard").iterdir()]
    assert any(b"bound/kl" in page for page in pages) and any(b"text/denoising" in page for page in pages)
    manifest = json.loads((run_dir / "checkpoints" / "step_00000006" / "manifest.json").read_text())
    assert manifest["consumed_tokens"] == 6 * 8 * 32 and manifest["layout"]["tensor"] == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TimeoutError("no data"), EXIT_NO_DATA),
        (TimeoutError(errno.ETIMEDOUT, "a file system does not answer"), EXIT_USAGE),
        (OSError("no disk"), EXIT_USAGE),
        (FloatingPointError("NaN"), EXIT_NON_FINITE),
    ],
)
def test_errors_have_one_sentence_and_a_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(commands, "doctor", fail)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == f"error: {error}\n"
