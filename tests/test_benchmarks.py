"""The benchmarks' bookkeeping, their searches, and that contenders do what they are said to do."""

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch


pytest.importorskip("accelerate")

from benchmarks import scoring, training_data, training_steps
from benchmarks.measure import _peak_memory as measure_peak
from benchmarks.measure import median_ratio, row, take_turns, time_rows, write_report
from benchmarks.top_k import as_tree, beam_search, exact_search
from benchmarks.training import full_logits, loss_contenders
from benchmarks.training_steps import Size, captioner, captioner_step, encoder_decoder, plain_step, random_batch
from ig_captioner.compiled_labels import CompiledTexts
from ig_captioner.label_trie import build_trie
from tiny import BFLOAT16_ATTENTION_FAILS, BFLOAT16_REASON


SIZE = Size("tiny", 16, 2, 3)
ROOT = Path(__file__).parent.parent
SCRIPTS = [
    path.relative_to(ROOT) for folder in ("benchmarks", "docs", "examples") for path in ROOT.glob(f"{folder}/**/*.py")
]
OWN = ("benchmarks", "conversion", "ig_captioner", "training")


@pytest.mark.parametrize("script", sorted(SCRIPTS), ids=str)
def test_scripts_import_what_is_there(script):
    """Most of them no test runs, so that a name that moves would be missed only when somebody measures again."""
    package = ".".join(script.parent.parts)
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        name = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        if name.split(".")[0] not in OWN:
            continue
        if name.startswith("ig_captioner.data.ray"):
            pytest.importorskip("ray", reason="ig_captioner.data.ray needs ray")
        module = importlib.import_module(name)
        for alias in node.names:
            is_module = hasattr(module, "__path__") and importlib.util.find_spec(f"{name}.{alias.name}") is not None
            assert hasattr(module, alias.name) or is_module, f"{name} has no {alias.name}"


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


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="peak memory is read from Linux's /proc; elsewhere the benchmark cannot start it anew",
)
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


@pytest.mark.skipif(BFLOAT16_ATTENTION_FAILS, reason=BFLOAT16_REASON)
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


# Scoring


class Clocked:
    """A captioner with uniform logits, whose clock counts images read and tokens decoded instead of seconds."""

    config = SimpleNamespace(decoder_start_token_id=0)
    per_image, per_token, vocabulary = 100.0, 3.0, 7

    def __init__(self):
        self.now = 0.0

    def seconds(self, run):
        start = self.now
        run()
        return self.now - start

    def read_image(self, pixel_values):
        self.now += self.per_image
        return pixel_values

    def __call__(self, input_ids, use_cache, pixel_values=None, image_key_values=None):
        assert (pixel_values is None) != (image_key_values is None)
        self.now += self.per_token * input_ids.numel() + (self.per_image if image_key_values is None else 0)
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocabulary))


@pytest.mark.parametrize("pairs", [40, 20, 10])
def test_slow_ways_measured_on_some_labels_are_scaled_to_all(monkeypatch, pairs):
    """By the clock, each label costs the same wherever it stands: what is scaled must be what all labels take."""
    model, lengths = Clocked(), torch.tensor([2, 2, 2, 2, 5, 5, 5, 5] * 5)
    for name, value in {"PAIRS": pairs, "DEVICE": torch.device("cpu"), "seconds": model.seconds}.items():
        monkeypatch.setattr(scoring, name, value)
    monkeypatch.setattr(scoring, "captioner", lambda design, dtype: model)
    mask = (torch.arange(5) < lengths[:, None]).long()
    scores = -lengths * torch.tensor(float(model.vocabulary)).log()
    once, again = scoring.slow_ways("any", {"input_ids": mask, "attention_mask": mask}, torch.float32, scores)
    assert once["labels_measured"] == again["labels_measured"] == pairs
    tokens = model.per_token * int(lengths.sum())
    assert once["seconds"] == pytest.approx(model.per_image + tokens)
    assert again["seconds"] == pytest.approx(len(lengths) * model.per_image + tokens)


def test_calls_keep_nothing_for_gradients(monkeypatch):
    """Peak memory is measured in a process where nothing else turns gradients off."""
    layer = torch.nn.Linear(1, 1)
    monkeypatch.setattr(scoring, "clip_tower", lambda dtype: lambda pixel_values: SimpleNamespace(image_embeds=use()))
    score = SimpleNamespace(score=lambda images, texts: SimpleNamespace(caption_log_likelihood=use()))
    monkeypatch.setattr(scoring, "captioner", lambda design, dtype: score)

    def use():
        return layer(torch.ones(1))

    assert torch.is_grad_enabled() and use().requires_grad
    for call in (scoring.clip_call(1, torch.float32), scoring.trie_call("any", None, 1, torch.float32)):
        assert not call().requires_grad


def test_size_of_compiled_texts_counts_prior_and_states():
    trie = build_trie(torch.tensor([[1, 2]]), torch.ones(1, 2), 0)
    texts = CompiledTexts(trie, torch.zeros(0))
    size = scoring.size_in_mb(texts)
    larger = dataclasses.replace(texts, prior_log_likelihood=torch.zeros(250_000), text_states=torch.zeros(500_000))
    assert size > 0 and scoring.size_in_mb(larger) == pytest.approx(size + 1 + 2)


def test_the_report_names_the_command_as_given(monkeypatch, tmp_path):
    monkeypatch.setattr(scoring, "DESIGNS", {})
    scoring.main(["--quick", "--output", str(tmp_path / "two words.json")])
    text = (tmp_path / "two words.md").read_text(encoding="utf-8")
    assert f"- command: python -m benchmarks.scoring --quick --output '{tmp_path}/two words.json'\n" in text


# Searches


@pytest.mark.parametrize("seed", range(40))
def test_searches_find_what_ranking_all_scores_finds(seed):
    """Texts with common beginnings, duplicates and ties; eighths and quarters, so that sums are exact in any order."""
    random = np.random.default_rng(seed)
    texts = [random.integers(1, 4, random.integers(1, 6)).tolist() for _ in range(random.integers(1, 30))]
    texts += texts[: len(texts) // 3]
    ids = torch.tensor([text + [0] * (5 - len(text)) for text in texts])
    tree = as_tree(build_trie(ids, (ids > 0).long(), 0))
    likelihood, prior = -random.integers(0, 9, (2, len(tree.node_behind))) / 8
    weight, number = random.integers(0, 5) / 4, len(tree.edges_of_node)
    scores = np.array([(likelihood - weight * prior)[edges].sum() for edges in tree.edges_of_text])
    ranking = np.argsort(-scores, kind="stable").tolist()
    before = 0
    for k in range(1, 6):
        nodes, found = exact_search(tree, likelihood, prior, weight, k)
        assert found == ranking[:k]
        assert 1 <= nodes <= number and before <= nodes
        before = nodes
    assert beam_search(tree, likelihood, prior, weight, 10_000) == (number, ranking)
    nodes, found = beam_search(tree, likelihood, prior, weight, 2)
    assert nodes <= min(number, 1 + 2 * 4)
    assert found == [text for text in ranking if text in found]


def test_exact_search_skips_what_cannot_win():
    """Three texts of three tokens: the best needs the root and its own two nodes, all together need all seven."""
    ids = torch.tensor([[1, 1, 1], [2, 2, 2], [3, 3, 3]])
    tree = as_tree(build_trie(ids, torch.ones_like(ids), 0))
    likelihood = np.full(len(tree.node_behind), -1.0)
    likelihood[tree.edges_of_text[1]] = -0.125
    prior = np.zeros_like(likelihood)
    assert exact_search(tree, likelihood, prior, 1.0, 1) == (3, [1])
    assert exact_search(tree, likelihood, prior, 1.0, 3) == (len(tree.edges_of_node), [1, 0, 2])
