"""Models in Hugging Face format become checkpoints: our own exports bit by bit, others with the logits they had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from checkpoints import SIZES, write_checkpoint
from distributed import run_ranks
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megadiff.cli import main
from megadiff.data.tokenizer import MASK_PIECE, Tokenizer, adopted_model
from megadiff.hf.convert import convert_to_hf
from megadiff.hf.distcp import DistributedCheckpoint
from megadiff.hf.importer import HuggingFaceModel
from megadiff.integrity import damage, read_manifest

TEXT = "  two spaces, a tab\t and a line end\n\u2581 \u00e9\U0001f600 <mask> </s>\n"
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def foreign_tokenizer(corpus_dir: Path) -> bytes:
    """A model as Llama's: ids 0, 1, 2 for unknown, begin and end, no padding, no mask, a dummy prefix."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((corpus_dir / "tokenizer.model").read_bytes())
    kept = [piece for piece in proto.pieces if piece.type != proto.SentencePiece.CONTROL and piece.piece != "<unk>"]
    special = [("<unk>", proto.SentencePiece.UNKNOWN), ("<s>", proto.SentencePiece.CONTROL)]
    special.append(("</s>", proto.SentencePiece.CONTROL))
    pieces = [proto.SentencePiece(piece=name, score=0.0, type=kind) for name, kind in special] + kept
    del proto.pieces[:]
    proto.pieces.extend(pieces)
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.add_dummy_prefix = True
    return proto.SerializeToString()


def test_foreign_tokenizers_lose_nothing_once_adopted(foreign_tokenizer: bytes, corpus_dir: Path) -> None:
    before = sentencepiece.SentencePieceProcessor(model_proto=foreign_tokenizer)
    assert (before.bos_id(), before.pad_id(), before.decode(before.encode(TEXT)) == TEXT) == (1, -1, False)
    model, num_new = adopted_model(foreign_tokenizer)
    tokenizer = Tokenizer(model)
    assert num_new == 2 and tokenizer.vocab_size == before.vocab_size() + 2
    assert (tokenizer.mask_id, tokenizer.pad_id) == (before.vocab_size(), before.vocab_size() + 1)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    ids = range(3, before.vocab_size())
    assert [before.id_to_piece(i) for i in ids] == [tokenizer._processor.id_to_piece(i) for i in ids]
    own = (corpus_dir / "tokenizer.model").read_bytes()
    assert adopted_model(own) == (own, 0) and adopted_model(model) == (model, 0)
    with pytest.raises(ValueError, match=r"tokenizer model \(4 bytes\) is not a SentencePiece model"):
        adopted_model(b"\xff\xff\xff\xff")


def foreign_model(folder: Path, tokenizer: bytes, kind: str) -> Tensor:
    """Save a small random model; returns its logits for `input_ids`."""
    torch.manual_seed(0)
    vocab_size = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).vocab_size()
    shared: dict[str, Any] = {**SMALL, "vocab_size": vocab_size, "max_position_embeddings": 24, "rms_norm_eps": 1e-5}
    model: Any
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shared, head_dim=8, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shared, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        logits = model(input_ids()).logits
    model.save_pretrained(folder, max_shard_size="20KB" if kind == "llama" else "1GB")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return logits


def input_ids() -> Tensor:
    return torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))


def causal_logits(runs: list[Path], ids_BL: Tensor) -> list[Tensor]:
    """Logits [B, L, V] of imported models, with attention that looks back."""
    from megadiff.config import TrainConfig
    from megadiff.diffusion import AttentionLayout
    from megadiff.parallel import groups as parallel_groups
    from megadiff.training.checkpoint import find_checkpoint
    from megadiff.training.state import load_denoiser

    logits = []
    for run in runs:
        checkpoint = find_checkpoint(run)
        manifest, config = read_manifest(checkpoint), TrainConfig.from_yaml(checkpoint / "config.yaml")
        groups = parallel_groups.initialize(parallel_groups.ParallelConfig())
        [denoiser] = load_denoiser(checkpoint, config.model, groups, sequence_length=ids_BL.shape[1])
        position_BL = torch.arange(ids_BL.shape[1]).expand_as(ids_BL)
        with torch.no_grad():
            logits_LBV = denoiser(ids_BL, position_BL, AttentionLayout("causal"))[..., : manifest["vocab_size"]]
        logits.append(logits_LBV.transpose(0, 1).contiguous())
    parallel_groups.shutdown()
    return logits


def import_all(sources: list[Path], output: Path) -> None:
    """In a process of its own, which may form groups."""
    for source in sources:
        assert main(["convert", "--from-hf", str(source), str(output / source.name)]) == 0


def test_imported_models_have_their_logits(foreign_tokenizer: bytes, tmp_path: Path) -> None:
    sources = [tmp_path / "hf" / kind for kind in ("llama", "qwen3")]
    expected = [foreign_model(source, foreign_tokenizer, source.name) for source in sources]
    run_ranks(1, import_all, sources, tmp_path)
    runs = [tmp_path / source.name for source in sources]
    [found] = run_ranks(1, causal_logits, runs, input_ids())
    for run, ours, theirs in zip(runs, found, expected, strict=True):
        assert theirs.std() > 0.1  # else agreement would mean little
        torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs, rtol=1e-5, atol=1e-5)
        checkpoint = run / "checkpoints" / "step_00000000"
        manifest = read_manifest(checkpoint)
        assert damage(checkpoint, manifest) == [] and manifest["vocab_size"] == theirs.shape[-1] + 2
        assert manifest["imported_from"] == {"path": str(tmp_path / "hf" / run.name), "model_type": run.name}
        state = DistributedCheckpoint(checkpoint / "state", ignore=lambda name: False)
        embedding, head = state["embedding.word_embeddings.weight"], state["output_layer.weight"]
        mask, old = manifest["mask_id"], theirs.shape[-1]
        torch.testing.assert_close(embedding[mask], embedding[:old].mean(dim=0))
        assert not head[mask].any() and torch.equal(head[manifest["pad_id"]], head[0])
        assert not embedding[old + 2 :].any() and not head[old + 2 :].any()


def test_own_exports_come_back_bit_by_bit(corpus_dir: Path, tmp_path: Path) -> None:
    tokenizer = corpus_dir / "tokenizer.model"
    state = write_checkpoint(tmp_path / "step_00000400", tokenizer=tokenizer)
    convert_to_hf(tmp_path / "step_00000400", tmp_path / "export")
    run_ranks(1, import_all, [tmp_path / "export"], tmp_path / "imported")
    checkpoint = tmp_path / "imported" / "export" / "checkpoints" / "step_00000000"
    assert (checkpoint / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    imported = DistributedCheckpoint(checkpoint / "state", ignore=lambda name: name.endswith("_extra_state"))
    assert imported.keys() == state.keys()
    for name, weight in state.items():
        rows = SIZES.vocab_size if weight.shape[0] == SIZES.padded_vocab_size else None
        assert torch.equal(imported[name][:rows], weight[:rows]), name
    # The same export again: all that it says of model and noise has come through.
    convert_to_hf(checkpoint, tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "export" / "config.json").read_text()


def test_what_a_denoiser_cannot_hold_is_refused(
    foreign_tokenizer: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good"
    foreign_model(good, foreign_tokenizer, "llama")
    settings = json.loads((good / "config.json").read_text())

    def refusal(**changes: Any) -> str:
        (good / "config.json").write_text(json.dumps({**settings, **changes}))
        with pytest.raises(ValueError) as caught:
            HuggingFaceModel.open(good)
        return str(caught.value)

    assert "cannot be imported: model_type is 'gpt2'" in refusal(model_type="gpt2")
    assert "hidden_act is 'gelu', not 'silu'" in refusal(hidden_act="gelu")
    assert "its layers have biases" in refusal(attention_bias=True)
    assert "head_dim is 16, not hidden_size / num_attention_heads = 8" in refusal(head_dim=16)
    rope = {"rope_theta": 10000.5, "rope_type": "llama3"}
    assert "of type 'llama3'; its rotary base 10000.5 is no whole number" in refusal(rope_parameters=rope)
    del settings["rms_norm_eps"]
    assert "config.json has no number for rms_norm_eps" in refusal()
    settings["rms_norm_eps"] = 1e-5
    assert "config.json has no number for hidden_size, vocab_size" in refusal(hidden_size=None, vocab_size="32k")
    (good / "config.json").write_text(json.dumps(settings))

    def command(source: Path, *options: str) -> str:
        assert main(["convert", "--from-hf", str(source), str(tmp_path / "out"), *options]) == 2
        return capsys.readouterr().err

    assert "config.json cannot be read" in command(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json cannot be read (a list, expected a mapping)" in command(tmp_path)
    assert "--weights, --dtype and --overwrite are for exports" in command(good, "--overwrite")
    other_tokenizer = tmp_path / "other"
    shutil.copytree(good, other_tokenizer)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(foreign_tokenizer)
    proto.pieces.add(piece=MASK_PIECE, score=0.0, type=proto.SentencePiece.CONTROL)
    (other_tokenizer / "tokenizer.model").write_bytes(proto.SerializeToString())
    assert "pieces: put the tokenizer there" in command(other_tokenizer)
    (good / "tokenizer.model").unlink()
    assert "it has no tokenizer.model, and no other kind of tokenizer is known here" in command(good)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").touch()
    assert "exists and is not empty" in command(good)


def test_missing_and_damaged_weights_are_named(foreign_tokenizer: bytes, tmp_path: Path) -> None:
    foreign_model(tmp_path, foreign_tokenizer, "qwen3")
    model = HuggingFaceModel.open(tmp_path)
    rows = {"vocab_size": model.sizes.vocab_size, "padded_vocab_size": 1024, "mask_id": 3, "unk_id": 0}
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        model.tensors(**rows)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no .safetensors file"):
        model.tensors(**rows)
