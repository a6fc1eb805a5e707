"""Adafactor against a slow reference: big_vision's chain of transformations in numpy, one number at a time."""

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from training.adafactor import Adafactor, factored_dimensions
from training.config import OptimizerConfig
from training.optim import make_optimizers, set_learning_rate


LR, DECAY = 0.01, 0.003


def to_bfloat16(values):
    return torch.from_numpy(values.astype(np.float32)).bfloat16().double().numpy()


class Reference:
    """scale_by_factored_rms, ema, scale(lr), add_decayed_weights, schedule, scale(-1); float64, momentum bfloat16."""

    def __init__(self, value, factored):
        self.value, self.factored, self.steps = value, factored, 0
        self.square, self.momentum = np.zeros_like(value), np.zeros_like(value)
        self.rows, self.columns = np.zeros(value.shape[0]), np.zeros(value.shape[-1])

    def step(self, gradient, schedule, decay):
        self.steps += 1
        beta2 = min(0.999, 1 - self.steps**-0.8)
        squared = gradient**2 + 1e-30
        update = np.zeros_like(gradient)
        if self.factored:
            rows, columns = gradient.shape
            for row in range(rows):
                mean = sum(squared[row, column] for column in range(columns)) / columns
                self.rows[row] = beta2 * self.rows[row] + (1 - beta2) * mean
            for column in range(columns):
                mean = sum(squared[row, column] for row in range(rows)) / rows
                self.columns[column] = beta2 * self.columns[column] + (1 - beta2) * mean
            for row in range(rows):
                for column in range(columns):
                    variance = self.rows[row] * self.columns[column] / np.mean(self.rows)
                    update[row, column] = gradient[row, column] / np.sqrt(variance)
        else:
            self.square = beta2 * self.square + (1 - beta2) * squared
            update = gradient / np.sqrt(self.square)
        momentum = 0.9 * self.momentum + 0.1 * update
        self.momentum = to_bfloat16(momentum)
        self.value = self.value - schedule * (LR * momentum + decay * self.value)


@pytest.mark.parametrize(
    ("shape", "factored"), [((33, 40), True), ((48, 32), True), ((31, 40), False), ((7,), False)], ids=str
)
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_steps_match_the_reference(shape, factored, decay):
    rng = np.random.default_rng(0)
    reference = Reference(rng.normal(size=shape), factored)
    parameter = torch.nn.Parameter(torch.from_numpy(reference.value).float())
    optimizer = Adafactor([parameter], lr=LR, weight_decay=decay)
    for schedule in (0.2, 0.6, 1.0, 1.0, 0.7, 0.1):
        gradient = rng.normal(size=shape) * rng.uniform(0.1, 10, size=shape[-1])
        parameter.grad = torch.from_numpy(gradient).float()
        set_learning_rate([optimizer], schedule)
        optimizer.step()
        reference.step(gradient, schedule, decay)
    assert torch.allclose(parameter.double(), torch.from_numpy(reference.value), atol=1e-5)
    state = optimizer.state[parameter]
    assert state["momentum"].dtype == torch.bfloat16
    assert set(state) == {"step", "momentum", *(("rows", "columns") if factored else ("square",))}


def test_beta2_is_bounded():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = Adafactor([parameter], beta2_cap=0.5)
    for gradient in (1.0, 2.0, 4.0):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
    second = (1 - 2**-0.8) * 1 + 2**-0.8 * 4
    assert optimizer.state[parameter]["square"].item() == pytest.approx(0.5 * second + 0.5 * 16)


def test_the_two_largest_dimensions_are_factored():
    assert factored_dimensions(torch.Size([768, 3, 16, 16])) is None
    assert factored_dimensions(torch.Size([768, 3, 32, 64])) == (3, 0)
    assert factored_dimensions(torch.Size([32, 32])) == (0, 1)
    assert factored_dimensions(torch.Size([1000])) is None


def test_state_dict_resumes_exactly():
    """Loading turns the momentum into float32; what follows must not notice."""
    runs = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(40, 40))
        optimizer = Adafactor([parameter], weight_decay=DECAY)
        for step in range(6):
            if interrupted and step == 3:
                state = optimizer.state_dict()
                optimizer = Adafactor([parameter])
                optimizer.load_state_dict(state)
            parameter.grad = torch.randn(40, 40)
            optimizer.step()
        runs.append(parameter.detach().clone())
    assert torch.equal(*runs)


def test_matrices_decay_and_tables_do_not():
    config = OptimizerConfig(name="adafactor", weight_decay=0.1, adafactor_momentum=0.5)
    (optimizer,) = make_optimizers(tiny_model(), config)
    assert sorted({group["weight_decay"] for group in optimizer.param_groups}) == [0.0, 0.1]
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
