"""Runs the experiments of `plan.py`, several at a time, and writes tables and pictures."""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ig_captioner.data.shards import find_shards
from training.train_tokenizer import read_all_captions, train_tokenizer

from .evaluate import CLASS_NAMES, TRAIN_SHARDS
from .long_tail import write_long_tail
from .pictures import draw_comparison, draw_long_tail
from .plan import (
    LONG_TAIL_SHARD,
    Recipe,
    Run,
    ablation_runs,
    comparison_runs,
    design_runs,
    load_recipe,
    long_tail_runs,
    search_runs,
)
from .report import ablations, comparison, designs, long_tail, write_report


HERE = Path(__file__).parent
EXPERIMENTS = ("comparison", "long_tail", "ablations", "designs")


class Workshop:
    """Where the runs of a recipe lie, and how they are started. Each is a process; finished ones are not repeated.

    Raises ValueError where runs of another recipe lie.
    """

    def __init__(self, options: argparse.Namespace, recipe: Recipe):
        self.options = options
        self.recipe = recipe
        self.folder = options.output_dir.resolve()
        self.tokenizer = self.folder / "tokenizer"
        self.long_tail = self.folder / LONG_TAIL_SHARD
        self.holdout = recipe.train["data"]["sources"]["cifar10"]["holdout_fraction"]
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(asdict(recipe))
        kept = self.folder / "recipe.json"
        if kept.is_file() and kept.read_text() != content:
            raise ValueError(f"{kept} is another recipe than {options.recipe}: name another --output_dir")
        kept.write_text(content)

    def prepare(self) -> None:
        """Tokenizer and long-tailed shard."""
        shards = find_shards(TRAIN_SHARDS.values(), self.options.data_root)
        if not (self.tokenizer / "tokenizer.json").is_file():
            captions = read_all_captions(shards, self.holdout)
            train_tokenizer(captions, self.recipe.vocab_size).save_pretrained(self.tokenizer)
        if not self.long_tail.is_file():
            cifar10 = find_shards([TRAIN_SHARDS["cifar10"]], self.options.data_root)
            write_long_tail(cifar10, self.long_tail, CLASS_NAMES, self.recipe.long_tail_ratio, self.holdout)

    def design_costs(self) -> dict[str, float]:
        """CPU seconds of a training step of each design; measured once."""
        path = self.folder / "design_costs.json"
        if not path.is_file():
            command = [sys.executable, "-m", "benchmarks.small_scale.design_costs", str(self.options.recipe), str(path)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            subprocess.run(command, env=environment, check=True)
        return json.loads(path.read_text(encoding="utf-8"))

    def run_all(self, runs: list[Run]) -> list[dict[str, Any]]:
        """The metrics of each. Raises RuntimeError, once all have ended, naming the log of one that failed."""
        with ThreadPoolExecutor(self.options.workers) as pool:
            futures = [pool.submit(self.run, run) for run in runs]
        return [future.result() for future in futures]

    def run(self, run: Run) -> dict[str, Any]:
        folder = self.folder / run.name
        if not (folder / "metrics.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            order = {
                "run": run._asdict(),
                "recipe": asdict(self.recipe),
                "tokenizer": str(self.tokenizer),
            }
            order |= {"long_tail": str(self.long_tail), "data_root": str(Path(self.options.data_root).resolve())}
            (folder / "run.json").write_text(json.dumps(order))
            command = [sys.executable, "-m", "benchmarks.small_scale.run", str(folder)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(self.options.threads)}
            with open(folder / "run.log", "w") as log:
                code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
            if code:
                raise RuntimeError(f"run {run.name} failed with exit code {code}, see {folder / 'run.log'}")
        metrics = json.loads((folder / "metrics.json").read_text())
        print(f"{run.name}: {metrics['minutes']} minutes, held-out quality {metrics['quality']:.4f}", flush=True)
        return metrics


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--recipe", type=Path, default=HERE / "cpu.yaml", help="cpu.yaml or gpu.yaml beside this file")
    parser.add_argument("--data_root", default=os.environ.get("IG_CAPTIONER_DATA", "data"))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/small_scale"))
    parser.add_argument("--results", type=Path, default=HERE.parent / "results" / "small_scale")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run")
    parser.add_argument("--ablation_seeds", type=int, default=1, help="of the recipe's seeds, the first so many")
    parser.add_argument("--design_seeds", type=int, help="the same for the designs (default: all)")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe)
    workshop = Workshop(options, recipe)
    workshop.prepare()
    command = describe_command(options)
    folder = options.results
    if set(options.experiments) & {"comparison", "ablations"}:
        searched = workshop.run_all(search_runs(recipe))
        rates = choose_rates(searched)
        compared = workshop.run_all(comparison_runs(recipe, rates))
    if "comparison" in options.experiments:
        text = comparison(compared, searched, recipe)
        write_report(folder, "comparison", text, searched + compared, command)
        draw_comparison(folder / "comparison.png", compared)
    if "long_tail" in options.experiments:
        uneven = workshop.run_all(long_tail_runs(recipe))
        write_report(folder, "long_tail", long_tail(uneven, recipe), uneven, command)
        draw_long_tail(folder / "long_tail.png", uneven, recipe)
    if "ablations" in options.experiments:
        seeds = recipe.seeds[: options.ablation_seeds]
        unchanged = [each for each in compared if each["run"]["seed"] in seeds and each["run"]["arm"] != "CLIP"]
        all_runs = unchanged + workshop.run_all(ablation_runs(recipe, rates, seeds))
        write_report(folder, "ablations", ablations(all_runs), all_runs, command)
    if "designs" in options.experiments:
        costs = workshop.design_costs()
        designed = workshop.run_all(design_runs(recipe, costs, recipe.seeds[: options.design_seeds]))
        write_report(folder, "designs", designs(designed, costs), designed, command)


def describe_command(options: argparse.Namespace) -> str:
    """The command with all that changes its results."""
    words = ["python", "-m", "benchmarks.small_scale", *options.experiments]
    if options.recipe != HERE / "cpu.yaml":
        words += ["--recipe", options.recipe.name]
    if options.ablation_seeds != 1:
        words += ["--ablation_seeds", str(options.ablation_seeds)]
    if options.design_seeds is not None:
        words += ["--design_seeds", str(options.design_seeds)]
    return shlex.join(words)


def choose_rates(searched: list[dict[str, Any]]) -> dict[str, float]:
    """Of each arm the factor with the best held-out quality."""
    best: dict[str, dict[str, Any]] = {}
    for each in searched:
        arm = each["run"]["arm"]
        if arm not in best or each["quality"] > best[arm]["quality"]:
            best[arm] = each
    return {arm: each["run"]["rate_factor"] for arm, each in best.items()}


if __name__ == "__main__":
    main()
