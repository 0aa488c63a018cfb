"""A run may be saved with one Adam and go on with another, in every wrapper of Megatron's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import tiny_config

from megadiff.accelerations import FUSED_ADAMS


class FusedAdam(torch.optim.Optimizer):
    """AdamW as Transformer Engine's and Apex's classes keep it: steps counted in groups, only moments in the state."""

    def __init__(self, groups: Any, *, bias_correction: bool, adam_w_mode: bool) -> None:
        assert adam_w_mode
        super().__init__(groups, {"lr": 0.0, "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] += 1
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                assert set(state) == {"exp_avg", "exp_avg_sq"}
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(parameter.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                root = (v / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(m, root, value=-group["lr"] / (1 - beta1 ** group["step"]))


def train_with(corpus: Path, directory: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Six steps of every case with torch's Adam alone, and with three Adams that follow each other."""
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training import optimizer
    from megadiff.training.trainer import Trainer

    for module in FUSED_ADAMS.values():
        sys.modules[module] = ModuleType(module)
        sys.modules[module].FusedAdam = FusedAdam  # type: ignore[attr-defined]
    optimizer.resolve_adam = lambda implementation: implementation

    found: dict[str, dict[str, list[float]]] = {}
    for name, sections in cases.items():
        found[name] = {}
        for sequence in (["torch"], ["transformer_engine", "torch", "apex"]):
            lines = []
            for implementation in sequence:
                config = tiny_config(corpus, optimizer={"implementation": implementation}, **sections)
                run_dir = directory / name / sequence[0]
                trainer = Trainer(config, run_dir, parallel_groups.initialize(config.parallel))
                trainer.resume()
                batches = trainer.training_batches()
                lines += [trainer.train_step(batches) for _ in range(6 // len(sequence))]
                trainer.save(is_final=True)
            found[name][sequence[0]] = [line[quantity] for line in lines for quantity in ("loss", "grad_norm")]
    parallel_groups.shutdown()
    return found


@pytest.mark.slow
def test_adams_follow_each_other_through_checkpoints(corpus_dir: Path, tmp_path: Path) -> None:
    """Expected: the rounding of another order of operations, near 1e-7; in bf16 now and then a neighbour, 2⁻⁸ apart."""
    sharded = {"use_distributed_optimizer": True}
    cases: dict[str, dict[str, Any]] = {
        "fp32, pp2": {"parallel": {"pipeline_model_parallel_size": 2}},
        "fp32, sharded": {"parallel": sharded},
        "bf16": {"training": {"precision": "bf16"}},
        "bf16, sharded": {"parallel": sharded, "training": {"precision": "bf16"}},
    }
    for found in run_ranks(2, train_with, corpus_dir, tmp_path, cases):
        for name, curves in found.items():
            pairs = zip(curves["transformer_engine"], curves["torch"], strict=True)
            worst = max(abs(a / b - 1) for a, b in pairs)
            print(f"{name}: {worst:.1e}")
            assert worst <= (1e-3 if "bf16" in name else 1e-5), name
