"""CPU seconds that a training step of each design takes, measured by turns on one thread.

CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 python -m benchmarks.small_scale.design_costs RECIPE.yaml OUTPUT.json
"""

import copy
import json
import statistics
import sys
from pathlib import Path

from training.config import OptimizerConfig, from_dict, set_nested

from ..measure import take_turns
from ..training_steps import build, captioner_step, random_batch
from .plan import DESIGNS, Recipe, load_recipe


ROUNDS = 5


def measure_costs(recipe: Recipe) -> dict[str, float]:
    """Median seconds by design, of batches as long as the recipe's captions may be."""
    steps = {}
    for name, changes in DESIGNS.items():
        values = copy.deepcopy(recipe.train)
        for key, value in changes.items():
            set_nested(values, key, value)
        model = values["model"]
        model["text_config"]["vocab_size"] = recipe.vocab_size
        batch = random_batch(
            values["batch_size"],
            4,
            values["data"]["max_length"],
            side=model["vision_config"]["image_size"],
            vocabulary=recipe.vocab_size,
        )
        steps[name] = captioner_step(build(model), batch, from_dict(OptimizerConfig, values["optimizer"]))
    return {name: statistics.median(times) for name, times in take_turns(steps, ROUNDS).items()}


if __name__ == "__main__":
    costs = measure_costs(load_recipe(Path(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")
