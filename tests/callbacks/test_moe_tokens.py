"""Which tokens count, and whose they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynwatch.callbacks.moe_pictures import coactivation_picture, load_picture
from dynwatch.callbacks.moe_probe import ProbeSet
from dynwatch.callbacks.moe_tokens import TokenLayout, is_ambiguous, is_sequence_major, sample_of_tokens
from dynwatch.callbacks.sample_losses import SampleLosses

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
CPU = torch.device("cpu")


def valid(batch: object, leading: tuple[int, ...], decoder: bool = False, padding_mask: object = None) -> object:
    found = TokenLayout(padding_mask).valid(batch, leading, decoder)  # type: ignore[arg-type]
    return None if found is None else found.int().tolist()


def test_a_mask_follows_the_order_of_tokens() -> None:
    """Batch-major, flat, sequence-major, and of a model that does not see the last position."""
    batch = {"attention_mask": MASK}
    assert valid(batch, (2, 4)) == valid(batch, (8,)) == [1, 1, 0, 0, 1, 1, 1, 0]
    assert valid(batch, (4, 2)) == [1, 1, 1, 1, 0, 1, 0, 0]
    assert valid(batch, (2, 3)) == [1, 1, 0, 1, 1, 1]


def test_where_there_is_no_mask_all_count() -> None:
    """Another kind of batch, no mask, a mask of another kind; one that does not fit is told."""
    assert valid([MASK], (2, 4)) is None and valid({"x": MASK}, (2, 4)) is None
    assert valid({"attention_mask": MASK[None]}, (2, 4)) is None
    layout = TokenLayout(None)
    assert layout.valid({"attention_mask": MASK}, (2, 9)) is None
    assert "a padding mask of shape [2, 4] does not fit the 18 tokens of a router" in layout.remark


def test_a_decoder_has_its_own() -> None:
    """Its mask, else its labels; never the encoder's."""
    labels = torch.tensor([[5, -100], [7, 8]])
    batch = {"attention_mask": MASK, "labels": labels}
    assert valid(batch, (2, 2), decoder=True) == [1, 0, 1, 1]
    assert valid(batch | {"decoder_attention_mask": torch.tensor([[0, 1], [1, 1]])}, (2, 2), True) == [0, 1, 1, 1]
    assert valid({"attention_mask": MASK}, (2, 4), decoder=True) is None


def test_the_users_mask_is_of_padding() -> None:
    """True is padding, as in torch's key_padding_mask."""
    assert valid({"pad": MASK == 0}, (2, 4), padding_mask="pad") == [1, 1, 0, 0, 1, 1, 1, 0]
    assert valid((MASK,), (2, 4), padding_mask=lambda batch: batch[0] == 0) == [1, 1, 0, 0, 1, 1, 1, 0]


def test_samples_of_tokens() -> None:
    assert sample_of_tokens((2, 3), 2, CPU).tolist() == [0, 0, 0, 1, 1, 1]
    assert sample_of_tokens((3, 2), 2, CPU).tolist() == [0, 1, 0, 1, 0, 1]
    assert sample_of_tokens((6,), 2, CPU).tolist() == [0, 0, 0, 1, 1, 1]
    assert sample_of_tokens((2, 2, 2), 2, CPU).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert is_sequence_major((3, 2), 2) and not is_sequence_major((2, 3), 2) and not is_sequence_major((6,), 2)
    assert is_ambiguous((4, 4), 4) and not is_ambiguous((1, 1), 1) and not is_ambiguous((4, 4), 2)
    with pytest.raises(ValueError, match="7 tokens of a router do not belong to 2 samples in equal parts"):
        sample_of_tokens((7,), 2, CPU)


# --- losses of samples


def test_losses_are_of_the_largest_cross_entropy() -> None:
    """By rows of a batch, of flattened rows, with ignored targets and probabilities as targets."""
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, -100, 2], [-100, -100, -100]])
    with SampleLosses(2) as watch:
        nn.functional.cross_entropy(torch.randn(2, 5), torch.tensor([0, 1]))
        nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        nn.functional.cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 2]))
    assert watch.losses is not None and bool(watch.losses[1].isnan())
    expected = nn.functional.cross_entropy(logits[0], targets[0])
    torch.testing.assert_close(watch.losses[0], expected)
    with SampleLosses(2) as watch:
        nn.functional.cross_entropy(logits.transpose(1, 2), torch.softmax(logits, -1).transpose(1, 2))
    each = nn.functional.cross_entropy(logits[1], torch.softmax(logits[1], -1))
    torch.testing.assert_close(watch.losses[1], each)  # type: ignore[index]
    with SampleLosses(2) as watch:
        nn.functional.binary_cross_entropy_with_logits(logits, torch.ones(2, 3, 5))
        nn.functional.nll_loss(torch.randn(6, 5), torch.arange(6) % 5)  # not normalised: passed over
    each = nn.functional.binary_cross_entropy_with_logits(logits[0], torch.ones(3, 5))
    torch.testing.assert_close(watch.losses[0], each)  # type: ignore[index]


# --- the probe


def test_a_probe_takes_the_first_samples() -> None:
    """Up to its number, from several batches, as copies; groups are numbers that keys stand for."""
    probe = ProbeSet("train", 5, None, "domain")
    x = torch.arange(12.0).view(3, 4)
    for i in range(3):
        if probe.wants("train"):
            probe.offer({"x": x + i, "domain": ["a", "b", "a"]}, i)
    x.zero_()
    assert [number for _, number in probe.batches] == [0, 1] and probe.samples == 5
    assert probe.batches[1][0]["x"].shape == (2, 4) and bool((probe.batches[0][0]["x"][0, 1:] > 0).all())
    groups = probe.groups()
    assert groups is not None and groups[0] == groups[2] == groups[3] != groups[1]
    assert not probe.wants("train") and not probe.wants("validate")


def test_a_probe_says_why_it_has_none() -> None:
    probe = ProbeSet("train", 5, None, None)
    probe.offer({"x": torch.ones(3, 2), "y": torch.ones(2)}, 0)
    assert "do not agree on a first dimension" in probe.reason and not probe.wants("train")
    wrong = ProbeSet("train", 5, None, lambda batch: ["a"])
    wrong.offer({"x": torch.ones(3, 2)}, 0)
    with pytest.raises(ValueError, match="gave 1 keys for the 3 samples of a batch"):
        wrong.groups()


def test_a_probe_survives_its_state() -> None:
    probe = ProbeSet("train", 4, None, "domain")
    probe.offer({"x": torch.ones(3, 2), "domain": ["a", "b", "a"]}, 7)
    other = ProbeSet("train", 4, None, "domain")
    other.load_state(probe.state())
    assert other.samples == 3 and other.wants("train") and other.groups() == probe.groups()
    other.offer({"x": torch.ones(3, 2), "domain": ["a", "b", "a"]}, 8)
    assert other.samples == 4 and not other.wants("train")


# --- pictures


def test_pictures_of_any_size() -> None:
    """One expert or 256, one layer or 60, a load of nothing."""
    for experts, layers in ((1, 1), (8, 3), (256, 60)):
        loads = {i: torch.rand(experts) * (i > 0) for i in range(layers)}
        picture = load_picture(loads, 10)
        assert picture.shape[2] == 3 and picture.shape[0] < 1000 and 400 < picture.shape[1] < 1200
        pairs = {i: torch.rand(experts, experts) for i in range(layers)}
        assert coactivation_picture(pairs, 10).shape[2] == 3
