"""A checkpoint becomes a directory that transformers loads offline, with the same logits, or is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    SEQUENCE_LENGTH,
    SIZES,
    default_config,
    default_manifest,
    random_state,
    reference_logits,
    sizes_with,
    write_checkpoint,
)
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from megadiff.diffusion.schedule import LogLinearSchedule
from megadiff.hf import convert
from megadiff.hf.convert import convert_to_hf

REPOSITORY = Path(__file__).parents[2]
IDS_BL = torch.randint(SIZES.vocab_size, (3, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(0))


def _load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


@torch.no_grad()
def _assert_same_logits(model: Any, state: dict[str, torch.Tensor], sizes: Any) -> None:
    logits_BLV = model(IDS_BL).logits
    assert logits_BLV.shape == (*IDS_BL.shape, sizes.vocab_size)
    for ids_L, logits_LV in zip(IDS_BL, logits_BLV, strict=True):
        expected_LV = reference_logits(state, sizes, ids_L)
        assert expected_LV.std() > 0.5  # else agreement would mean little
        torch.testing.assert_close(logits_LV.double(), expected_LV, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_query_groups", [2, 4])
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_logits_are_those_of_the_denoiser(tmp_path: Path, num_query_groups: int, num_blocks: int) -> None:
    sizes = sizes_with(num_query_groups=num_query_groups)
    state = write_checkpoint(tmp_path / "checkpoint", sizes=sizes, num_blocks=num_blocks)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    model = _load(tmp_path / "exported")
    assert type(model).__name__ == "MegadiffForDiffusionLM" and model.dtype == torch.float32
    _assert_same_logits(model, state, sizes)


def test_multipliers_of_the_parametrisation_become_part_of_the_weights(tmp_path: Path) -> None:
    config = default_config(SIZES)
    config["model"]["parametrization"] = "complete_p"
    state = write_checkpoint(tmp_path / "checkpoint", config=config)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    multiplied = {
        name: weight * (2.0 if "linear_proj" in name or "linear_fc2" in name else 1.0) for name, weight in state.items()
    }
    model = _load(tmp_path / "exported")
    model.lm_head.weight.data /= 512 / SIZES.hidden_size  # whose logits are too large to compare closely
    _assert_same_logits(model, multiplied, SIZES)


def test_defaults_of_the_config_are_filled_in(tmp_path: Path) -> None:
    sizes = sizes_with(num_query_groups=4, ffn_hidden_size=128)
    config = default_config(sizes)
    config["model"].update(num_query_groups=None, ffn_hidden_size=None)
    config["objective"].update(noise="masked", shift=None, scale=None)
    state = write_checkpoint(tmp_path / "checkpoint", sizes=sizes, config=config)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    model = _load(tmp_path / "exported")
    assert (model.config.noise_type, model.config.noise_shift, model.config.noise_scale) == ("masked", 0, 1)
    _assert_same_logits(model, state, sizes)


def test_long_positions_keep_their_phase(tmp_path: Path) -> None:
    state = write_checkpoint(tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    model = _load(tmp_path / "exported")
    ids_L = torch.randint(SIZES.vocab_size, (600,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits_LV = model(ids_L[None]).logits[0]
    # float32 angles near 600 are exact to 6e-5 only; a wrong base or a dropped position would show at once
    torch.testing.assert_close(logits_LV.double(), reference_logits(state, SIZES, ids_L), rtol=0, atol=2e-4)


def test_bfloat16_export_holds_rounded_weights(tmp_path: Path) -> None:
    state = random_state(SIZES)
    write_checkpoint(tmp_path / "checkpoint", state={name: w.bfloat16() for name, w in state.items()})
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "low", dtype="bfloat16")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "high", dtype="float32")
    low, high = _load(tmp_path / "low", dtype=torch.bfloat16), _load(tmp_path / "high")
    assert {w.dtype for w in load_file(tmp_path / "low" / "model.safetensors").values()} == {torch.bfloat16}
    assert high.dtype == torch.float32
    for name, weight in low.state_dict().items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight.float(), high.state_dict()[name])
    with torch.no_grad():
        error = (low(IDS_BL).logits.float() - high(IDS_BL).logits).abs().max()
    assert 0 < error < 0.2
    ids = low.generate(IDS_BL[:, :4], num_denoising_steps=3, seed=0)
    assert ids.shape == IDS_BL.shape


def test_large_models_are_written_in_shards(tmp_path: Path) -> None:
    state = write_checkpoint(tmp_path / "checkpoint")
    limit = 60_000  # bytes; embedding and head alone take 51 200 each
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported", max_shard_size=limit)
    files = sorted(tmp_path.glob("exported/*.safetensors"))
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    assert [f.name for f in files] == [
        f"model-0000{i}-of-0000{len(files)}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) >= 3 and set(index["weight_map"].values()) == {f.name for f in files}
    contents = [load_file(f) for f in files]
    sizes = [sum(w.nbytes for w in content.values()) for content in contents]
    assert max(sizes) <= limit and index["metadata"]["total_size"] == sum(sizes)
    # A file must not carry the rows that were cut off, nor tensors that share memory.
    assert sum(f.stat().st_size for f in files) < sum(sizes) + 4000 * len(files)
    assert not list(tmp_path.glob("exported/part-*"))
    _assert_same_logits(_load(tmp_path / "exported"), state, SIZES)


def test_run_directory_means_its_newest_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    write_checkpoint(checkpoints / "step_00000900", state=random_state(SIZES, seed=1))
    newest = write_checkpoint(checkpoints / "step_100000000", state=random_state(SIZES, seed=2))
    (checkpoints / "step_200000000.partial").mkdir()
    with caplog.at_level(logging.INFO, logger="megadiff"):
        convert_to_hf(tmp_path / "run", tmp_path / "exported")
    assert "taking its newest checkpoint, step_100000000" in caplog.text
    _assert_same_logits(_load(tmp_path / "exported"), newest, SIZES)


def test_masked_diffusion_in_time_form_is_exported_by_its_range_of_levels(tmp_path: Path) -> None:
    config = default_config(SIZES)
    config["objective"] = {"name": "mdlm", "loss_weighting": "simple", "masking": "levels", "epsilon": 1e-3}
    write_checkpoint(tmp_path / "checkpoint", config=config)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    exported = AutoConfig.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    schedule = LogLinearSchedule(epsilon=1e-3)
    assert exported.noise_type == "masked"
    assert exported.min_log_snr == pytest.approx(schedule.min_log_snr, rel=1e-12)
    assert exported.max_log_snr == pytest.approx(schedule.max_log_snr, rel=1e-12)


def test_every_auto_class_loads_and_the_config_tells_the_noise(tmp_path: Path) -> None:
    config = default_config(SIZES)
    config["objective"].update(noise="hybrid", shift=-2.0, scale=0.5, min_log_snr=-8.0, max_log_snr=7.0)
    write_checkpoint(tmp_path / "checkpoint", config=config)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    config = AutoConfig.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    names = ("noise_type", "noise_shift", "noise_scale", "min_log_snr", "max_log_snr", "mask_token_id")
    assert [getattr(config, name) for name in names] == ["hybrid", -2.0, 0.5, -8.0, 7.0, 3]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert config.suppressed_token_ids == [0, 2] and config.max_position_embeddings == SEQUENCE_LENGTH
    base = AutoModel.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    full = _load(tmp_path / "exported")
    with torch.no_grad():
        hidden = base(IDS_BL).last_hidden_state
        assert torch.equal(full.lm_head(hidden), full(IDS_BL).logits)


def test_an_export_survives_save_pretrained(tmp_path: Path, tokenizer_path: Path) -> None:
    state = write_checkpoint(tmp_path / "checkpoint", tokenizer=tokenizer_path)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    _load(tmp_path / "exported").save_pretrained(tmp_path / "again")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    tokenizer.save_pretrained(tmp_path / "again")
    _assert_same_logits(_load(tmp_path / "again"), state, SIZES)
    again = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again("x ▁ y")["input_ids"] == tokenizer("x ▁ y")["input_ids"]


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_lines_of_the_model_card_work(
    tmp_path: Path, tokenizer_path: Path, with_tokenizer: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_checkpoint(tmp_path / "checkpoint", tokenizer=tokenizer_path if with_tokenizer else None)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "my-model")
    card = (tmp_path / "my-model" / "README.md").read_text(encoding="utf-8")
    assert "400 steps, 76,800 tokens" in card
    assert "5.2500 ± 0.0300 nats per token (perplexity at most 190.57)" in card
    assert "2.1250" in card and "hybrid, uniform share sigmoid(1·λ +0)" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 5
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    output = capsys.readouterr().out
    assert output.startswith("Once upon a time") if with_tokenizer else len(json.loads(output)) == SEQUENCE_LENGTH
    assert (tmp_path / "my-model" / "tokenizer.model").exists() == with_tokenizer


def test_a_card_without_validation(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", manifest={**default_manifest(SIZES), "validation": None})
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert "nats per token" not in card and "bits per byte" not in card


def test_a_card_tells_when_and_on_what_it_was_measured(tmp_path: Path) -> None:
    manifest = default_manifest(SIZES) | {"corpus_sha256": "ab" * 32, "corpus_python": "3.12.1"}
    manifest["validation"] |= {"step": 1350}
    write_checkpoint(tmp_path / "checkpoint", manifest=manifest)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert f"| corpus | SHA-256 {'ab' * 32}, prepared with Python 3.12.1 |" in card
    assert "(perplexity at most 190.57), measured at step 1,350 |" in card
    assert "| 2.1250, measured at step 1,350 |" in card


def _write_broken(folder: Path, **files: str | None) -> None:
    """A checkpoint of which some files are replaced (`__` stands for a dot) or, with None, deleted."""
    write_checkpoint(folder)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.unlink() if content is None else path.write_text(content)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"manifest__json": None}, "is no checkpoint: it lacks manifest.json and state/"),
        ({"config__yaml": None}, r"config.yaml cannot be read \(.*No such file"),
        ({"config__yaml": "a: [1,"}, r"config.yaml cannot be read \("),
        ({"config__yaml": "just text"}, "the content of .*config.yaml is a str, expected a mapping"),
        ({"config__yaml": "model: 3"}, "model of .*config.yaml is a int, expected a mapping"),
        ({"manifest__json": "{"}, r"manifest.json cannot be read \("),
        ({"manifest__json": "{}"}, "vocab_size in .*manifest.json is None, expected a number"),
        ({"tokenizer__model": "nonsense"}, "tokenizer.model is no SentencePiece model"),
    ],
)
def test_incomplete_checkpoints(tmp_path: Path, files: dict[str, str | None], message: str) -> None:
    _write_broken(tmp_path / "checkpoint", **files)
    with pytest.raises(ValueError, match=message):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"num_layers": "two"}, "model.num_layers in .* is 'two', expected a number"),
        ("model", {"num_layers": True}, "model.num_layers in .* is True, expected a number"),
        ("model", {"num_layers": 3}, r"the checkpoint lacks decoder\.layers\.2\."),
        ("model", {"num_layers": 1}, r"the checkpoint holds decoder\.layers\.1\."),
        ("model", {"ffn_hidden_size": 64}, r"fc1.weight has shape \(48, 32\), expected \(64, 32\)"),
        (
            "model",
            {"parametrization": "mup"},
            "model.parametrization is 'mup', but must be one of standard, complete_p",
        ),
        ("model", {"log_snr_conditioning": True}, "holds a denoiser that is conditioned on the noise level"),
        ("objective", {"name": "eso_lm"}, "objective.name in .* is 'eso_lm', whose models cannot be exported yet"),
        ("objective", {"prompt_fraction": 0.2}, r"on prompts that see only themselves \(two-level attention\)"),
        ("data", {"kind": "examples"}, r"on prompts that see only themselves \(two-level attention\)"),
        ("objective", {"attention_annealing_samples": 10**9}, "of the 1000000000 samples over which its attention"),
        ("objective", {"noise": "gaussian"}, "objective.noise in .* is 'gaussian', expected one of masked"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, section: str, changes: dict[str, Any], message: str) -> None:
    config = default_config(SIZES)
    config[section].update(changes)
    write_checkpoint(tmp_path / "checkpoint", config=config)
    with pytest.raises(ValueError, match=message):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_tokenizer_of_another_size(tmp_path: Path, tokenizer_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", sizes=sizes_with(vocab_size=401), tokenizer=tokenizer_path)
    with pytest.raises(ValueError, match="has 400 pieces, expected the model's 401"):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported")


def test_a_tokenizer_that_is_not_the_one_of_training(tmp_path: Path, tokenizer_path: Path) -> None:
    sha256 = hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    for name, recorded in (("right", sha256), ("wrong", "0" * 64)):
        manifest = default_manifest(SIZES) | {"tokenizer_sha256": recorded}
        write_checkpoint(tmp_path / name, tokenizer=tokenizer_path, manifest=manifest)
    convert_to_hf(tmp_path / "right", tmp_path / "exported")
    with pytest.raises(ValueError, match=f"tokenizer.model has the SHA-256 {sha256}, expected 0{{64}} as in manifest"):
        convert_to_hf(tmp_path / "wrong", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (["step_00000002", "step_00000010", "step_00000009"], "step_00000010"),
        (["step_99999999", "step_100000000"], "step_100000000"),
        (["step_00000001", "step_00000002.partial", "step_00000003.deleting"], "step_00000001"),
        (["step_00000001", "step_2", "step_0000003", "step_", "xstep_00000004", "step_-0000005"], "step_00000001"),
        (["step_00000002.partial", "step_3"], None),
        ([], None),
    ],
)
def test_the_newest_checkpoint_is_the_one_of_training(tmp_path: Path, names: list[str], newest: str | None) -> None:
    """Export and training know nothing of each other, but of a run directory they must take the same checkpoint."""
    from megadiff.hf.source import _find_checkpoint
    from megadiff.training.checkpoint import find_checkpoint

    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for name in names:
        (checkpoints / name / "state").mkdir(parents=True)
        (checkpoints / name / "manifest.json").write_text("{}")
    for find in (_find_checkpoint, find_checkpoint):
        if newest is None:
            with pytest.raises(ValueError, match="run"):
                find(tmp_path)
        else:
            assert find(tmp_path) == checkpoints / newest
        for name in names:  # what is named itself is taken at its word
            assert find(checkpoints / name) == checkpoints / name


def test_places_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a run without checkpoints; train until the first is saved"):
        convert_to_hf(tmp_path / "run", tmp_path / "exported")
    with pytest.raises(ValueError, match="is no checkpoint"):
        convert_to_hf(tmp_path / "nowhere", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_unknown_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype is 'float16', expected one of float32, bfloat16"):
        convert_to_hf(tmp_path, tmp_path / "exported", dtype="float16")
    with pytest.raises(ValueError, match="max_shard_size is 0, expected a positive number of bytes"):
        convert_to_hf(tmp_path, tmp_path / "exported", max_shard_size=0)


def test_an_output_in_the_way_is_left_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (precious / "config.json").write_text('{"model_type": "llama"}')
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not empty and no earlier export, so it is left alone"):
            convert_to_hf(tmp_path / "checkpoint", precious, overwrite=overwrite)
    with pytest.raises(ValueError, match="is a file, expected a directory"):
        convert_to_hf(tmp_path / "checkpoint", precious / "thesis.txt", overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_an_earlier_export_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "first", state=random_state(SIZES, seed=1))
    second = write_checkpoint(tmp_path / "second", state=random_state(SIZES, seed=2))
    output = tmp_path / "deep" / "exported"
    output.mkdir(parents=True)  # empty, so not in the way
    convert_to_hf(tmp_path / "first", output)
    (output / "stale.txt").write_text("of the first export")
    with pytest.raises(ValueError, match="already holds an export; replace it with --overwrite or give another output"):
        convert_to_hf(tmp_path / "second", output)
    convert_to_hf(tmp_path / "second", output, overwrite=True)
    assert not (output / "stale.txt").exists()
    assert [path.name for path in output.parent.iterdir()] == ["exported"]
    _assert_same_logits(_load(output), second, SIZES)


def test_a_failure_half_way_leaves_the_old_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    before = {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()}

    def fail(*args: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "model_card", fail)
    with pytest.raises(KeyboardInterrupt):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "exported", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "exported"]


def test_the_tool_needs_neither_megatron_nor_transformers(tmp_path: Path) -> None:
    """Exports, refuses in one line, replaces when told; of us it imports the command line, this room and factors."""
    write_checkpoint(tmp_path / "checkpoint")
    code = f"""
import runpy, sys
for options in (["--dtype", "bfloat16"], [], ["--overwrite"]):
    sys.argv = ["convert_to_hf.py", {str(tmp_path / "checkpoint")!r}, {str(tmp_path / "exported")!r}, *options]
    try:
        runpy.run_path("tools/convert_to_hf.py", run_name="__main__")
    except SystemExit as end:
        dtype = open({str(tmp_path / "exported" / "config.json")!r}).read().partition('"dtype": "')[2].partition('"')[0]
        print(end.code, dtype)
heavy = ("megatron", "transformers", "megadiff.training", "megadiff.parallel")
factors = ["megadiff.models", "megadiff.models.parametrization"]
print([name for name in heavy if name in sys.modules])
print(sorted(name for name in sys.modules if name.startswith("megadiff.models")) == factors)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["0 bfloat16", "2 bfloat16", "0 float32", "[]", "True"], result.stderr
    errors = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and re.fullmatch("error: .* already holds an export; .*--overwrite.*", errors[0])
