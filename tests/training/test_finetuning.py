"""Fine-tuning: prompts are read but neither noised nor learned, filling has no influence, ragged batches add up.

Tolerance between layouts: fp32 sums in another order, as in `test_layouts`.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config

from megadiff.cli import main
from megadiff.config import TrainConfig, default_objective
from megadiff.data.corpus import Corpus
from megadiff.data.preprocess import PrepareConfig, prepare
from megadiff.diffusion import Samples
from megadiff.objectives import OBJECTIVES, Vocabulary

TOLERANCE = 1e-5
RAGGED = {"kind": "examples", "pad_response_in_loss": False}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 100 sums with prompts and responses of one to a dozen words."""
    source = random.Random(0)
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    with path.open("w") as file:
        for number in range(100):
            numbers = [source.randrange(10) for _ in range(source.randrange(1, 8))]
            response = " ".join([*["so"] * source.randrange(7), str(sum(numbers))])
            file.write(json.dumps({"prompt": f"{number}: {'+'.join(map(str, numbers))}=", "response": response}) + "\n")
    return path


@pytest.fixture(scope="module")
def examples_dir(examples: Path) -> Path:
    options: dict[str, Any] = {"vocab_size": 300, "validation_fraction": 0.2}
    directory = examples.parent / "corpus"
    prepare(PrepareConfig(kind="examples", input=(str(examples),), output_dir=directory, **options))
    return directory


def tuned(corpus: Path, cases: list[dict[str, dict[str, Any]]]) -> list[dict[str, list[float]]]:
    """Train each case, all of one layout, for four steps; what this rank saw."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    groups = parallel_groups.initialize(tiny_config(corpus, **cases[0]).parallel)
    seen = []
    for sections in cases:
        trainer = Trainer(tiny_config(corpus, **sections), Path("unused"), groups)
        batches = trainer.training_batches()
        lines = [trainer.train_step(batches) for _ in range(4)]
        estimate = trainer.validate()
        seen.append(
            {name: [line[name] for line in lines] for name in ("loss", "nelbo", "grad_norm")}
            | {"validation": [estimate.nelbo, estimate.stderr, estimate.bits_per_byte]}
        )
    parallel_groups.shutdown()
    return seen


def test_ragged_batches_are_normalised_by_the_global_token_count(examples_dir: Path) -> None:
    """However 8 samples are divided into micro-batches and ranks, each counted token weighs the same."""

    def case(micro_batch_size: int, **data: Any) -> dict[str, dict[str, Any]]:
        return {"data": RAGGED | data, "training": {"micro_batch_size": micro_batch_size}}

    config = tiny_config(examples_dir, data=RAGGED).data
    counted = config.loader(Corpus.open(examples_dir), "train", seed=7).batch(range(8)).loss_mask_BL.sum(dim=1)
    assert counted.min() >= 2 and counted.max() >= 2 * counted.min(), "not ragged: nothing would be compared"

    fused = case(4) | {"model": {"fused_head_loss": True}}
    whole, single, fours, fused_fours, padded = run_ranks(
        1, tuned, examples_dir, [case(8), case(1), case(4), fused, case(4, pad_response_in_loss=True)]
    )[0]
    two_ranks = [curves for [curves] in run_ranks(2, tuned, examples_dir, [case(2)])]
    for curves in (single, fours, fused_fours, *two_ranks):
        for name, values in whole.items():
            assert curves[name] == pytest.approx(values, rel=TOLERANCE), name
    assert padded["loss"] != pytest.approx(whole["loss"], rel=0.01)


@pytest.mark.slow
def test_every_objective_is_tuned_alike_on_every_way_to_divide(examples_dir: Path) -> None:
    """Prompts travel with the tokens, are permuted and doubled with them, and are cut like them."""
    divided = [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}]
    shared: dict[str, Any] = {"data": RAGGED, "training": {"micro_batch_size": 4}, "optimizer": {"adam_eps": 1e-5}}
    cases = [{"objective": default_objective(name), **shared} for name in OBJECTIVES]
    [alone] = run_ranks(1, tuned, examples_dir, cases, timeout=300.0)
    for parallel in divided:
        for curves in run_ranks(
            2, tuned, examples_dir, [{**case, "parallel": parallel} for case in cases], timeout=300.0
        ):
            for name, curve, expected in zip(OBJECTIVES, curves, alone, strict=True):
                for quantity, values in expected.items():
                    assert curve[quantity] == pytest.approx(values, rel=TOLERANCE), (name, parallel, quantity)


def influence_of_padding(corpus: Path) -> dict[str, list[float]]:
    """Loss and gradient of a micro-batch, with padding hidden and seen, as it is and exchanged for other tokens."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.trainer import Trainer

    config = tiny_config(corpus, data=RAGGED, training={"micro_batch_size": 8})
    trainer = Trainer(config, Path("unused"), parallel_groups.initialize(config.parallel))
    batches = trainer.training_batches()
    for _ in range(2):  # an untrained head predicts the same whatever it sees
        trainer.train_step(batches)
    batch = next(batches)
    padding_BL = ~(batch.loss_mask_BL | batch.given_BL)
    assert padding_BL.any()
    exchanged = dataclasses.replace(batch, tokens_BL=torch.where(padding_BL, 17, batch.tokens_BL))
    found = {}
    for name, step in {"hidden": trainer.step, "seen": dataclasses.replace(trainer.step, hides_padding=False)}.items():
        for variant, tokens in {"": batch, ", exchanged": exchanged}.items():
            for chunk in trainer.chunks:
                chunk.zero_grad_buffer()
            trainer.optimizer.zero_grad()
            [logged] = step.run_micro_batches(trainer.chunks, iter([tokens]), 1)
            gradients = [p.main_grad.flatten() for p in trainer.chunks[0].parameters()]
            found[name + variant] = [*logged.tolist(), *torch.cat(gradients).tolist()]
    parallel_groups.shutdown()
    return found


def test_padding_has_no_influence(examples_dir: Path) -> None:
    [found] = run_ranks(1, influence_of_padding, examples_dir)
    assert found["hidden"] == found["hidden, exchanged"]
    assert found["seen"][0] != pytest.approx(found["seen, exchanged"][0], rel=1e-6), "the model never looked"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_prompts_stay_clean_and_weigh_nothing(name: str) -> None:
    settings: Any = OBJECTIVES[name]
    objective = settings().build(Vocabulary(size=50, mask_id=3, bos_id=0, eos_id=1, pad_id=2))
    ordinal_B = torch.arange(64)
    tokens_BL = 5 + (torch.arange(16) * 7 + ordinal_B[:, None]) % 45
    given_BL = torch.arange(16) < 1 + ordinal_B[:, None] % 9
    samples = Samples(tokens_BL=tokens_BL, counted_BL=~given_BL, given_BL=given_BL, ordinal_B=ordinal_B)
    for validation in (False, True):
        noised = objective.noised_batch(samples, 11, validation=validation)
        rows = noised.rows
        for weight_BS in (rows.kl_weight, rows.is_weight, rows.elbo_weight):
            assert (weight_BS.isfinite()).all() and not weight_BS[~rows.counted].any()
        assert rows.counted.sum() == (~given_BL).sum()
        if noised.noised_BS.shape == tokens_BL.shape and noised.layout.kind == "bidirectional":  # prediction in place
            assert torch.equal(noised.noised_BS[given_BL], tokens_BL[given_BL])
            assert torch.equal(rows.counted, ~given_BL)
            assert (noised.noised_BS != tokens_BL)[~given_BL].any()


def test_masks_follow_from_the_settings(examples_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def features(self: Any, *, documents: bool, prompts: bool) -> frozenset[Any]:
        asked.append((documents, prompts))
        return frozenset()

    monkeypatch.setattr(OBJECTIVES["gidd"], "mask_features", features)
    for data in ({}, {"kind": "examples"}, RAGGED, {"reset_at_document": True}):
        tiny_config(examples_dir, data=data).check(1)
    assert asked == [(False, False), (False, True), (True, True), (True, False)]


def test_refuses_to_cut_responses_off(examples_dir: Path) -> None:
    for cutting in ("random_length_fraction", "max_empty_token_fraction"):
        config = tiny_config(examples_dir, data=RAGGED, objective={cutting: 0.01})
        with pytest.raises(
            ValueError, match=rf"objective.{cutting} is 0.01, but must be 0 with data.kind examples: it"
        ):
            config.check(1)


def prepared_trained_and_measured(folder: Path, examples: Path) -> list[int]:
    """Exit codes of the commands that a user types."""
    recipe = folder / "recipe.py"
    recipe.write_text(
        "from pathlib import Path\nfrom tiny import tiny_config\n\n\ndef config():\n"
        f'    return tiny_config(Path({str(folder / "corpus")!r}), data={{"kind": "examples"}})\n'
    )
    run_dir = str(folder / "run")
    commands = [
        f"prepare --kind examples --input {examples} --output-dir {folder / 'corpus'} --vocab-size 300",
        f"preview {recipe} --num-samples 1 --colour never",
        f"train {recipe} --run-dir {run_dir} --training.train-steps 2",
        f"train {recipe} --run-dir {run_dir} --training.train-steps 4",
        f"evaluate {run_dir} --data.pad-response-in-loss false",
        f"generate {run_dir} --prompt 7: --num-denoising-steps 2 --length 16",
    ]
    return [main(command.split()) for command in commands]


def test_from_a_file_of_examples_to_text(examples: Path, tmp_path: Path) -> None:
    assert run_ranks(1, prepared_trained_and_measured, tmp_path, examples) == [[0] * 6]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "grad_norm" in line] == [1, 2, 3, 4]
    saved = TrainConfig.from_yaml(tmp_path / "run" / "checkpoints" / "step_00000004" / "config.yaml")
    assert saved.data.kind == "examples" and saved.data.pad_response_in_loss
