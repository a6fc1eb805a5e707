"""The benchmarks' bookkeeping, and that the contenders of `benchmarks.training` do what they are said to do."""

import json
from pathlib import Path

import pytest
import torch


pytest.importorskip("accelerate")

from benchmarks import training_data, training_steps
from benchmarks.measure import _peak_memory as measure_peak
from benchmarks.measure import median_ratio, row, take_turns, time_rows, write_report
from benchmarks.training import full_logits, loss_contenders
from benchmarks.training_steps import Size, captioner, captioner_step, encoder_decoder, plain_step, random_batch


SIZE = Size("tiny", 16, 2, 3)


def test_contenders_take_turns_after_a_warm_up():
    calls = []
    times = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == list("ab" * 3)
    assert {name: len(each) for name, each in times.items()} == {"a": 2, "b": 2}


def test_ratios_are_medians_of_each_rounds_own():
    times = {"a": [1.0, 10.0, 2.0], "b": [2.0, 20.0, 2.0]}
    assert median_ratio(times["b"], times["a"]) == 2.0
    first, second = time_rows(times, {"b": "a"}, "s")
    assert first == row("a", 2.0, "s") and second == row("b", 2.0, "s", "a", 2.0)
    _, speed = time_rows(times, {"b": "a"}, "images/s", amount=10)
    assert speed == row("b", 5.0, "images/s", "a", 0.5)


def allocate(megabytes):
    kept = torch.ones(1_000_000)
    return lambda: torch.ones(int(megabytes * 250_000)).add(kept[0])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
def test_peak_memory_counts_what_a_step_allocates():
    assert 190 < measure_peak(allocate, 100) < 220


def test_report(tmp_path):
    rows = [row("a", 1 / 3, "s"), row("b", 2.0, "s", "a", 6.0)]
    text = write_report(tmp_path / "new" / "file.json", rows, {"command": "x"})
    assert json.loads((tmp_path / "new" / "file.json").read_text()) == rows
    assert (tmp_path / "new" / "file.md").read_text() == text
    assert "| b | 2 | s | 6 | a |" in text and "- command: x" in text


def test_loss_contenders_agree():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, training_steps.VOCABULARY, bias=False)
    states, labels = torch.randn(2, 3, 8, requires_grad=True), torch.randint(100, (2, 3))
    expected = torch.autograd.grad(full_logits(states, head, labels), [states, head.weight])
    for loss in loss_contenders().values():
        actual = torch.autograd.grad(loss(states, head, labels), [states, head.weight])
        for gradient, reference in zip(actual, expected, strict=True):
            torch.testing.assert_close(gradient, reference)


def test_both_models_have_the_same_size_and_steps_change_them():
    ours, peer = captioner(SIZE), encoder_decoder(SIZE)
    numbers = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, peer)]
    assert abs(numbers[0] / numbers[1] - 1) < 0.01
    batch = random_batch(SIZE.batch, 2, 5)
    assert [len(caption) for caption in sorted(batch["captions"], key=len)] == [2, 4, 5]
    for model, step in ((ours, captioner_step(ours, batch)), (peer, plain_step(peer, batch, length=9))):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        step()
        changed = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
        assert sum(changed) / len(changed) > 0.9


def test_both_loaders_give_the_same_kind_of_batch(tmp_path):
    training_data.write_tokenizer(tmp_path)
    paths = training_data.write_shards(tmp_path, shards=1, samples=40, side=64)
    ours = next(training_data.our_batches(paths, tmp_path))
    assert ours["pixel_values"].shape == (32, 3, 224, 224)
    pytest.importorskip("webdataset")
    images, labels = next(training_data.webdataset_batches(paths, tmp_path))
    assert images.shape == ours["pixel_values"].shape and images.dtype == ours["pixel_values"].dtype
    for pixels, texts in ((images, labels), (ours["pixel_values"], ours["labels"])):
        assert -1 <= pixels.min() < -0.5 and 0.5 < pixels.max() <= 1
        assert len(texts) == 32 and 6 < texts.shape[1] <= training_data.MAX_LENGTH
