"""Options that trade time for memory, or memory for time, leave the losses as they are."""

import functools
import json
import shutil

import pytest
import torch
from training_runs import run_config

from ig_captioner.encoder_ig_captioner import IGCaptionerMLP
from training.train import train


def losses(workspace, output_dir, **options):
    """Per logged step: losses, and the gradient's norm."""
    options = {"model.text_config.dropout": 0.2, "log_every_steps": 1, **options}
    train(run_config(workspace, output_dir, **options))
    rows = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    names = ("loss", "captioning_loss", "unconditional_loss", "grad_norm")
    return torch.tensor([[row[name] for name in names] for row in rows])


@pytest.fixture(scope="module")
def plain(workspace, tmp_path_factory):
    return losses(workspace, tmp_path_factory.mktemp("plain"))


def test_gradient_checkpointing(workspace, tmp_path, plain, monkeypatch):
    """With the same dropout in the second forward pass."""
    calls, forward = [], IGCaptionerMLP.forward

    def counted(*arguments, **kwargs):
        calls.append(torch.is_grad_enabled())
        return forward(*arguments, **kwargs)

    monkeypatch.setattr(IGCaptionerMLP, "forward", counted)
    assert torch.allclose(losses(workspace, tmp_path, gradient_checkpointing=True), plain, atol=2e-5)
    # of the encoder, a text-only layer, and the fusion layer in two paths; again in the backward pass
    assert sum(calls) == 4 * (4 + 4)


def test_accumulation_over_parts(workspace, tmp_path):
    """Without dropout, which draws other numbers for other parts."""
    options = {"model.text_config.dropout": 0.0}
    whole = losses(workspace, tmp_path / "whole", **options)
    parts = losses(workspace, tmp_path / "parts", micro_batches=3, **options)
    assert torch.allclose(parts, whole, atol=1e-4)


def compiled_with(backend, monkeypatch):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_module, backend=backend))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.slow
def test_compiled_model(workspace, tmp_path, monkeypatch):
    """Traced, without the generation of code, which takes a minute."""
    options = {"model.text_config.dropout": 0.0}
    whole = losses(workspace, tmp_path / "plain", **options)
    compiled_with("aot_eager", monkeypatch)
    assert torch.allclose(losses(workspace, tmp_path / "compiled", compile=True, **options), whole, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("g++"),
    reason="no g++ on the PATH: torch.compile's inductor builds C++ code on a CPU",
)
def test_model_compiled_to_code(workspace, tmp_path, monkeypatch):
    options = {"model.text_config.dropout": 0.0, "gradient_checkpointing": True}
    whole = losses(workspace, tmp_path / "plain", **options)
    compiled_with("inductor", monkeypatch)
    assert torch.allclose(losses(workspace, tmp_path / "compiled", compile=True, **options), whole, atol=1e-3)
