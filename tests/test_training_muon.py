"""Muon: the same steps as torch's, in either number format."""

import pytest
import torch

from training.muon import Muon, orthogonalise


SHAPES = [(12, 5), (5, 12), (8, 8)]


def train(make_optimizer, steps=4):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make_optimizer(parameters)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_steps_in_bfloat16_are_bit_identical_to_those_of_torch(adjust_lr):
    shared = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    ours = train(lambda parameters: Muon(parameters, **shared, adjust_lr=adjust_lr))
    theirs = train(lambda parameters: torch.optim.Muon(parameters, **shared, adjust_lr_fn=adjust_lr))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_gives_what_bfloat16_rounds(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact, rounded = (orthogonalise(matrix, 5, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert (exact - rounded).norm() < 0.05 * exact.norm()
    singular_values = torch.linalg.svdvals(exact)
    assert singular_values.min() > 0.5 and singular_values.max() < 1.5
