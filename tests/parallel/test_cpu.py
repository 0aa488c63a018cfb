"""The shim: inert under CUDA, and a canary that names what moved when Megatron-Core's pin changes."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import subprocess
import sys

import pytest
import torch

from megadiff.parallel import cpu

PINNED = "0.16.1"

# Everything of Megatron-Core that megadiff relies on beyond its documented interfaces: dotted name -> parameters that
# are passed by name.
RELIED_ON = {
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": ("new_state",),
    "megatron.core.tensor_parallel.model_parallel_cuda_manual_seed": ("seed", "force_reset_rng"),
    "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue": (),
    "megatron.core.dist_checkpointing.strategies.filesystem_async._get_write_results_queue": (),
    "megatron.core.models.gpt.GPTModel._postprocess": ("hidden_states",),
    "megatron.core.models.gpt.GPTModel.forward": ("extra_block_kwargs", "attention_mask"),
    "megatron.core.optimizer.optimizer.FP32Optimizer": ("optimizer", "config", "init_state_fn"),
    "megatron.core.optimizer.optimizer.FP32Optimizer.step_with_ready_grads": (),
    "megatron.core.optimizer.optimizer.MegatronOptimizer.clip_grad_norm": ("clip_grad",),
    "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params": ("optimizer", "config", "grad_scaler"),
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer": (
        "model_chunks",
        "per_model_buffers",
        "data_parallel_group",
        "data_parallel_group_gloo",
        "data_parallel_group_idx",
        "distributed_optimizer_instance_id",
    ),
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states": (
        "model_param",
        "tensors",
    ),
    "megatron.core.process_groups_config.ProcessGroupCollection.use_mpu_process_groups": (),
    "megatron.core.pipeline_parallel.get_forward_backward_func": ("pp_size", "vp_size"),
    "megatron.core.optimizer.optimizer.param_group_identifier_keys": (),
    "megatron.core.optimizer.clip_grads.clip_grad_by_total_norm_fp32": ("parameters", "max_norm", "total_norm"),
    "megatron.core.process_groups_config.ProcessGroupCollection.setup_process_groups_for_optimizer": (
        "pg_collection",
        "model_chunks",
        "use_gloo_process_groups",
    ),
    "megatron.core.transformer.transformer_block.TransformerBlockSubmodules": ("layer_specs", "layer_norm"),
    "megatron.core.transformer.transformer_block.get_num_layers_to_build": ("config", "pp_rank"),
    "megatron.core.transformer.transformer_layer.get_transformer_layer_offset": ("config", "vp_stage", "pp_rank"),
    "megatron.core.fp8_utils.is_first_last_bf16_layer": ("config", "layer_no"),
    "megatron.core.tensor_parallel.ColumnParallelLinear._forward_impl": ("input", "weight"),
    "megatron.core.tensor_parallel.RowParallelLinear._forward_impl": ("input", "weight"),
    "megatron.core.distributed.finalize_model_grads": ("model", "num_tokens"),
}


@pytest.mark.parametrize("name", RELIED_ON)
def test_megatron_still_has_what_we_rely_on(name: str) -> None:
    module_name, *attributes = name.split(".")
    found = importlib.import_module(module_name)
    for attribute in attributes:
        try:
            found = getattr(found, attribute)
        except AttributeError:
            found = importlib.import_module(f"{found.__name__}.{attribute}")
    if RELIED_ON[name]:
        parameters = inspect.signature(found).parameters
        missing = [parameter for parameter in RELIED_ON[name] if parameter not in parameters]
        assert not missing, f"{name} lost {missing}; it has {list(parameters)}"


def test_pin_is_the_release_that_was_checked() -> None:
    assert importlib.metadata.version("megatron-core") == PINNED


def test_does_nothing_where_cuda_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = (torch.empty, torch.Tensor.type, torch.cuda.current_device)
    assert cpu.install() is False
    assert (torch.empty, torch.Tensor.type, torch.cuda.current_device) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")
def test_reads_cuda_as_cpu_and_leaves_the_rest_alone() -> None:
    """In a process of its own, because an installed shim stays."""
    script = """
import torch
from megadiff.parallel import cpu
assert cpu.install() and cpu.install()
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
assert torch.tensor(1.0, device=torch.device("cuda", 0)).device.type == "cpu"
assert torch.zeros(2, device="meta").device.type == "meta"
name = torch.zeros(1).type()
assert name == "torch.cuda.FloatTensor" and name == "torch.FloatTensor" and name != "torch.cuda.HalfTensor"
assert torch.zeros(1).type() in ["torch.cuda.HalfTensor", "torch.cuda.FloatTensor"]
assert torch.zeros(1).type(torch.float64).dtype == torch.float64
assert torch.ones(1).cuda() == 1
torch.manual_seed(3)
state = torch.cuda.get_rng_state()
first = torch.rand(1)
from megatron.core.tensor_parallel import random
random._set_cuda_rng_state(state)
assert torch.rand(1) == first
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
