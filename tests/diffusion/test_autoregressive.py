"""The autoregressive baseline: its loss is −log p(x), documents are texts of their own, nothing is random."""

import dataclasses
import itertools

import pytest
import torch
from diffusion.rows_reference import make_samples, row_losses
from diffusion.tiny_denoiser import TinyDenoiser, causal

from megadiff.diffusion import AutoregressiveObjective, Objective, random_lengths
from megadiff.objectives import AutoregressiveConfig, Vocabulary

V, MASK, BOS, SEED = 5, 3, 1, 7
OBJECTIVE = AutoregressiveObjective(mask_id=MASK, bos_id=BOS)
DENOISER = TinyDenoiser(V)
WORDS = [v for v in range(V) if v != MASK]


def random_tokens(batch_size, length):
    choice = torch.randint(len(WORDS), (batch_size, length), generator=torch.Generator().manual_seed(0))
    return torch.tensor(WORDS)[choice]


def log_likelihood(text):
    """log p(x) of one text by the chain rule, one prediction at a time."""
    total = 0.0
    for i, token in enumerate(text):
        ids = torch.tensor([[BOS, *text[:i]]])
        logits = DENOISER(ids, torch.arange(i + 1)[None], causal(i + 1))[0, -1]
        total += logits[WORDS].log_softmax(-1)[WORDS.index(token)].item()
    return total


def test_the_loss_is_the_negative_log_likelihood():
    tokens = random_tokens(6, 9)
    batch = OBJECTIVE.noised_batch(make_samples(tokens), SEED)
    loss, nelbo = row_losses(DENOISER.on(batch), batch.rows, MASK)
    expected = torch.tensor([-log_likelihood(text) for text in tokens.tolist()], dtype=torch.float64)
    torch.testing.assert_close(loss.sum(-1), expected, rtol=1e-10, atol=0)
    assert torch.equal(nelbo, loss)
    assert batch.rows.counted.all() and batch.noised_BS.shape == tokens.shape


def test_probabilities_of_all_texts_sum_to_one():
    texts = torch.tensor(list(itertools.product(WORDS, repeat=3)))
    batch = OBJECTIVE.noised_batch(make_samples(texts), SEED)
    _, nelbo = row_losses(DENOISER.on(batch), batch.rows, MASK)
    assert nelbo.sum(-1).neg().exp().sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("vocab_size, initial_loss", [(32_001, 10.37349), (131_072, 11.78349)])
def test_initial_loss_is_the_published_one(vocab_size, initial_loss):
    samples = make_samples(torch.tensor([[5, 6, 7]]))
    rows = OBJECTIVE.noised_batch(samples, SEED).rows
    loss, nelbo = row_losses(torch.zeros(1, 3, vocab_size), rows, MASK)
    assert loss.mean().item() == nelbo.mean().item() == pytest.approx(initial_loss, abs=1e-5)


def test_documents_are_texts_of_their_own():
    tokens = random_tokens(1, 9)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    batch = OBJECTIVE.noised_batch(make_samples(tokens, document_BL=documents), SEED)
    loss, _ = row_losses(DENOISER.on(batch), batch.rows, MASK)
    by_document = [
        -log_likelihood(tokens[0, documents[0] == document].tolist()) for document in documents.unique().tolist()
    ]
    sums = torch.zeros(3, dtype=torch.float64).index_add(0, documents[0], loss[0])
    torch.testing.assert_close(sums, torch.tensor(by_document, dtype=torch.float64), rtol=1e-10, atol=0)


def test_prompts_are_read_and_not_counted():
    tokens = random_tokens(2, 8)
    given = (torch.arange(8) < torch.tensor([[3], [5]]).view(2, 1)).expand(2, 8)
    plain = OBJECTIVE.noised_batch(make_samples(tokens), SEED)
    batch = OBJECTIVE.noised_batch(make_samples(tokens, given_BL=given, counted_BL=~given), SEED)
    assert torch.equal(batch.noised_BS, plain.noised_BS)
    assert torch.equal(batch.rows.counted, ~given)
    assert torch.equal(batch.rows.kl_weight != 0, ~given) and torch.equal(batch.rows.elbo_weight != 0, ~given)


def test_some_training_samples_are_cut_and_no_validation_sample_is():
    objective: Objective = dataclasses.replace(OBJECTIVE, random_length_fraction=0.5)
    samples = make_samples(random_tokens(40, 12))
    lengths = random_lengths(samples.ordinal_B, 12, 0.5, SEED)
    assert 0 < int((lengths < 12).sum()) < 40
    batch = objective.noised_batch(samples, SEED)
    assert torch.equal(batch.rows.counted, torch.arange(12) < lengths[:, None])
    index = torch.tensor([0, 1, 2, 9, 10, 11])
    for place in (None, index):
        rows = batch.rows if place is None else batch.rows.select(place)
        assert objective.count_active_rows(samples.ordinal_B, 12, SEED, index_S=place) == int(
            (rows.kl_weight > 0).sum()
        )
    assert objective.noised_batch(samples, SEED, validation=True).rows.counted.all()
    assert objective.count_active_rows(samples.ordinal_B, 12, SEED, validation=True) == 40 * 12


def test_settings():
    vocabulary = Vocabulary(size=V, mask_id=MASK, bos_id=BOS, eos_id=2, pad_id=0)
    config = AutoregressiveConfig(random_length_fraction=0.25)
    assert config.build(vocabulary) == dataclasses.replace(OBJECTIVE, random_length_fraction=0.25)
    assert config.mask_features(documents=False, prompts=True) == {"causal", "documents"}
    assert AutoregressiveConfig().mask_features(documents=False, prompts=False) == {"causal"}
    assert not config.gives_log_snr and config.model_length(12) == OBJECTIVE.sequence_length(12) == 12
    with pytest.raises(ValueError, match="objective autoregressive has no noise process"):
        config.process(vocabulary)
