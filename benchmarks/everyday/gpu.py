"""How the shipped checkpoint was found, in one go on one GPU: features, a search, seeds, rivals, evaluation.

    python -m benchmarks.everyday.gpu --work WORK --data DATA --encoder FOLDER --output OUT [--minutes 8 | --samples N]

1. The features of all training photos, once, for every run (`training.feature_cache`).
2. Variants of `everyday_gpu.yaml`, at the same time on the one GPU, each for a third of the minutes. The best on
   held-out training samples is the recipe, and its run the checkpoint. With `--samples` the recipe is the
   configuration as it is, trained with so many: nothing is searched, and three seeds train at the same time (`gpu.sh`).
3. At the same number of samples, again at the same time: two more seeds of it; a run that leaves out a fifth of the
   class names, which templates and prior weight are chosen with (`training.tune`); and three seeds of a dual encoder,
   whose variant is the best of several that had a quarter of the samples.
4. `ig-captioner evaluate` on the test shards, of all of these (the tasks of `benchmarks.evaluate_checkpoint`).

OUT gets what is learned, in float16 files under 16 MiB: three seeds and the run with names left out, without their
encoder, which is at hand; three dual encoders; and a file of results and logs.
A step that is done is not done again, so that the same command goes on where it was stopped.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.evaluate_checkpoint import TASKS, command_of
from training.train_tokenizer import main as train_tokenizer
from training.tune import save_choice


CONFIG = "training/configs/everyday_gpu.yaml"
SOURCES = ("tiny_imagenet", "flickr8k", "caltech101")
TRAIN_SHARDS = ("tiny-imagenet-train-*.tar.gz", "flickr8k-train-*.tar", "caltech101-train-*.tar.gz")
BASE = "--batch_size 512 --optimizer.lr 0.001"
VARIANTS: dict[str, str] = {  # of the recipe, which is the best of them, batch-1024
    "base": BASE,
    "dropout-0.1": f"{BASE} --model.text_config.dropout 0.1",
    "dropout-0.3": f"{BASE} --model.text_config.dropout 0.3",
    "flickr-0.3": f"{BASE} --data.sources.flickr8k.weight 0.3 --data.sources.tiny_imagenet.weight 0.55",
    "lr-2e-3": "--batch_size 512",
    "batch-1024": "",
    "half": f"{BASE} --half",
    "sequence": f"{BASE} --model.loss_reduction sequence",
}
RECIPE = "batch-1024"
NAMES_LEFT_OUT = " ".join(
    f"--data.sources.{name}.holdout_names_fraction 0.2" for name in ("tiny_imagenet", "caltech101")
)
TOWERS = {f"lr-{rate}": f"--learning_rate {rate}" for rate in ("3.5e-4", "7e-4", "1.4e-3")}
TOWERS["mean"] = "--learning_rate 7e-4 --pooling mean"
TOWER_SEARCH_SHARE = 4  # of the samples, one part: what a variant of the dual encoder is chosen by
SEEDS = (0, 1, 2)
STEPS = ("features", "search", "rivals", "evaluate")


class Runner:
    """Runs commands of this tree, some at a time; the output of each goes to a log."""

    def __init__(self, logs: Path, at_once: int, environment: dict[str, str]) -> None:
        self.logs = logs
        self.places = Semaphore(at_once)
        self.environment = environment
        self.stopped = False
        logs.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, self.stop)  # as `timeout` sends to the commands as well

    def stop(self, *_: Any) -> None:
        say("SIGTERM: no further command")
        self.stopped = True

    def __call__(self, name: str, module: str, *words: Any) -> bool:
        """Whether the command succeeded; a failure is told, and what depends on it goes without."""
        command = [sys.executable, "-m", module, *map(str, words)]
        with self.places, open(self.logs / f"{name}.log", "w", encoding="utf-8") as log:
            if self.stopped:
                return False
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            started = time.monotonic()
            code = subprocess.run(command, stdout=log, stderr=log, env=self.environment, check=False).returncode
        say(f"{name}: {'done' if code == 0 else f'FAILED with {code}'} in {time.monotonic() - started:.0f} s")
        if code:
            say("  " + "\n  ".join((self.logs / f"{name}.log").read_text(encoding="utf-8").splitlines()[-12:]))
        return code == 0


STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", flush=True)


class Search:
    """The steps of the module's docstring; every run has a folder in `work`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work = options.work
        self.common = shlex.split(options.overrides)
        self.common += ["--tokenizer", str(self.work / "tokenizer")]
        self.common += ["--encoder_from", str(options.encoder)] if options.encoder else []
        self.common += ["--data_root", str(options.data), "--data.feature_cache.folder", str(self.work / "features")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.run = Runner(self.work / "logs", options.at_once, environment)

    def features(self) -> None:
        if not (self.work / "tokenizer").exists():
            shards = [str(self.options.data / pattern) for pattern in TRAIN_SHARDS]
            train_tokenizer([str(self.work / "tokenizer"), "--vocab_size", "4000", "--shards", *shards])
        if not self.run("features", "training.feature_cache", "--config", self.options.config, *self.common):
            raise SystemExit("no features, nothing to train on")

    def train(self, name: str, words: list[str]) -> bool:
        """Trains a captioner in `work/name` and measures it on held-out samples; the clock is a second limit."""
        folder = self.work / name
        if not (folder / "final").exists():
            words = [*self.common, *words, "--output_dir", str(folder), "--resume"]
            if not self.run(f"train-{name}", "training.train", "--config", self.options.config, *words):
                return False
        words = ["--run", folder, "--output", folder / "tuned.json", "--candidates", "1"]
        return (folder / "tuned.json").exists() or self.run(f"tune-{name}", "training.tune", *words)

    def search(self) -> tuple[str, dict[str, dict[str, float]]]:
        """The best of the variants, and the figures of all."""
        minutes = self.options.minutes / 3

        def one(name: str) -> bool:
            words = shlex.split(VARIANTS[name])
            share = 0.5 if "--half" in words else 1.0
            words = [word for word in words if word != "--half"]
            return self.train(name, [*words, "--max_minutes", str(minutes * share)])

        names = self.options.variants
        with ThreadPoolExecutor(len(names)) as pool:
            done = [name for name, ok in zip(names, pool.map(one, names), strict=True) if ok]
        if not done:
            raise SystemExit("every variant failed")
        figures = {name: summary(json.loads((self.work / name / "tuned.json").read_text())) for name in done}
        for name, row in figures.items():
            say(f"{name:14s} " + " ".join(f"{key} {value:.3f}" for key, value in row.items()))
        return max(figures, key=lambda name: figures[name]["quality"]), figures

    def recipe(self, samples: int) -> str:
        """Trains three seeds and the run with names left out, all at once; returns the name of the first."""
        runs = {RECIPE: self.limits(samples), **self.beside(RECIPE, samples)}
        with ThreadPoolExecutor(len(runs)) as pool:
            done = {name: pool.submit(self.train, name, words) for name, words in runs.items()}
        if not done[RECIPE].result():
            raise SystemExit("the recipe failed")
        return RECIPE

    def limits(self, samples: int) -> list[str]:
        return ["--max_samples", str(samples), "--max_minutes", str(self.options.minutes)]

    def beside(self, best: str, samples: int) -> dict[str, list[str]]:
        """Two more seeds of a variant, and its run with names left out: their changes to the configuration."""
        words = [word for word in shlex.split(VARIANTS[best]) if word != "--half"] + self.limits(samples)
        seeds = {f"seed-{seed}": [*words, "--seed", str(seed)] for seed in SEEDS[1:]}
        return {**seeds, "names-left-out": [*words, *NAMES_LEFT_OUT.split()]}

    def seeds_and_rivals(self, best: str) -> str:
        """Trains all that stands beside the best run; returns the name of the best dual encoder."""
        samples = last_samples(self.work / best)

        def tower(name: str, words: list[str], samples: int) -> bool:
            folder = self.work / f"tower-{name}"
            words = [*words, "--run", self.work / best, "--output", folder, "--samples", samples]
            words += ["--batch_size", self.options.batch_size]
            done = (folder / "held_out.json").exists()
            return done or self.run(f"tower-{name}", "benchmarks.everyday.dual_encoder", *words)

        def towers() -> str:
            with ThreadPoolExecutor(len(TOWERS)) as pool:
                jobs = {
                    name: pool.submit(tower, name, shlex.split(words), samples // TOWER_SEARCH_SHARE)
                    for name, words in TOWERS.items()
                }
            done = [name for name, job in jobs.items() if job.result()]
            if not done:
                return ""
            chosen = max(done, key=lambda name: quality(self.held_out_of(name)))
            say(f"dual encoder: {chosen}")
            with ThreadPoolExecutor(len(SEEDS)) as pool:
                for seed in SEEDS:
                    pool.submit(tower, f"seed-{seed}", [*shlex.split(TOWERS[chosen]), "--seed", str(seed)], samples)
            return chosen

        with ThreadPoolExecutor(8) as pool:
            rivals = pool.submit(towers)
            jobs = {name: pool.submit(self.train, name, words) for name, words in self.beside(best, samples).items()}
            names = jobs.pop("names-left-out")
            names_run = ["--names_run", self.work / "names-left-out"] if names.result() else []
            chosen = self.work / best / "chosen.json"
            words = ["--run", self.work / best, *names_run, "--output", chosen, "--save"]
            if chosen.exists() or self.run(f"choose-{best}", "training.tune", *words):
                choice = json.loads(chosen.read_text())
                for name in (name for name, job in jobs.items() if job.result()):
                    save_choice(self.work / name / "final", choice["prompt_templates"], choice["prior_weight"])
        return rivals.result()

    def held_out_of(self, tower: str) -> dict[str, Any]:
        return json.loads((self.work / f"tower-{tower}" / "held_out.json").read_text())

    # Evaluation

    def evaluate(self, best: str) -> None:
        """`ig-captioner evaluate` of the best run and its seeds, the dual encoders, and the encoder by a probe."""
        jobs: dict[str, list[Any]] = {}
        models = {name: self.work / name / "final" for name in (best, "seed-1", "seed-2")}
        for name, model in models.items():
            if (model / "config.json").exists():
                jobs |= {
                    f"{name}/{task}": self.command(task, model, name)
                    for task in self.options.tasks
                    if "probe" not in task
                }
        for seed in SEEDS:
            tower = self.work / f"tower-seed-{seed}"
            if (tower / "tower.safetensors").exists():
                name = f"dual-encoder-{seed}"
                for task in (task for task in self.options.tasks if TASKS[task].startswith(("zero-shot", "retrieval"))):
                    jobs[f"{name}/{task}"] = for_tower(self.command(task, models[best], name), tower)
        probes = [task for task in self.options.tasks if "probe" in task]
        jobs |= {f"probe/{task}": self.command(task, models[best], "probe") for task in probes}

        def one(name: str) -> bool:
            written = self.work / "results" / name / "results.json"
            if not written.exists():
                self.run(name.replace("/", "-"), "ig_captioner.cli", *jobs[name])
            return written.exists()

        with ThreadPoolExecutor(self.options.at_once) as pool:
            say(f"evaluated {sum(pool.map(one, jobs))} of {len(jobs)}")

    def command(self, task: str, model: Path, folder: str) -> list[Any]:
        """The arguments of `ig-captioner` for a task of `benchmarks.evaluate_checkpoint`."""
        places = {"data_root": self.options.data, "output_dir": self.work / "results" / folder}
        limit = None if "--pairs" in TASKS[task] else self.options.limit  # few of all pairs have their photo there
        options = argparse.Namespace(model=model, limit=limit, dtype=self.options.dtype, **places)
        return [*command_of(task, options), "--device", "auto"]

    # What comes back

    def pack(self, best: str) -> None:
        out = self.options.output
        out.mkdir(parents=True, exist_ok=True)
        for name in (best, "seed-1", "seed-2", "names-left-out"):
            path = self.work / name / "final" / "model.safetensors"
            if path.exists():
                weights = load_file(path)
                learned = {key: value for key, value in weights.items() if not key.startswith("model.vision_model.")}
                save_file(learned, out / f"{name}.safetensors", {"format": "pt"})
        for name in (f"tower-seed-{seed}" for seed in SEEDS):
            path = self.work / name / "tower.safetensors"
            if path.exists():
                weights = {key: value.half() for key, value in load_file(path).items()}
                save_file(weights, out / f"{name}.safetensors", safe_open(path, "pt").metadata())
        with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
            for path in sorted(self.work.rglob("*")):
                small = path.is_file() and path.stat().st_size < 2**20 and path.suffix not in (".png", ".py", ".bin")
                if small and "features" not in path.parts:
                    archive.add(path, path.relative_to(self.work))
        for path in sorted(out.iterdir()):
            say(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")


def for_tower(command: list[Any], tower: Path) -> list[Any]:
    """The same task on the same samples for a dual encoder."""
    _, task, *words = command
    if task == "zero-shot":
        words[words.index("--data")] = "--labelled"
    return ["evaluate", "lit", "--tower", tower, *words]


def summary(tuned: dict[str, Any]) -> dict[str, float]:
    """The figures of one run with the first candidate's template, each at the weight that is best for it."""
    figures = tuned["candidates"][0]["run"]
    row = {f"{name} top-1": max(figures[name]["known"]) for name in figures if "known" in figures[name]}
    for name in figures:
        if "known" not in figures[name]:
            row["image to text"] = max(figures[name]["image to text R@10"])
            row["text to image"] = figures[name]["text to image R@10"]
    return {**row, "quality": sum(row.values()) / len(row)}


def quality(held_out: dict[str, Any]) -> float:
    return summary({"candidates": [{"run": {name: held_out[name] for name in SOURCES if name in held_out}}]})["quality"]


def last_samples(run: Path) -> int:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return max(row["samples"] for row in rows if "samples" in row)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("work", "data", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="folder of the encoder; default: what the configuration says")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--minutes", type=float, default=8.0, help="of training in all, features and evaluation apart")
    parser.add_argument("--samples", type=int, help="of each run of the recipe, without a search")
    parser.add_argument("--batch_size", type=int, default=1024, help="of dual encoders")
    parser.add_argument("--at_once", type=int, default=8, help="processes")
    parser.add_argument("--overrides", default="", help="of the configuration, for all runs")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="default: all")
    parser.add_argument("--limit", type=int, help="test samples per task, to try the script")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="default: all")
    parser.add_argument("--dtype", help="number format of the evaluation, as `ig-captioner evaluate` takes it")
    parser.add_argument("--only", choices=STEPS, nargs="+", help="some of the steps")
    options = parser.parse_args(arguments)
    search = Search(options)
    steps = options.only or STEPS
    chosen_path = options.work / "chosen.json"
    chosen = json.loads(chosen_path.read_text()) if chosen_path.exists() else {}
    say(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}")
    try:
        if "features" in steps:
            search.features()
        if "search" in steps:
            if options.samples is None:
                chosen["best"], chosen["figures"] = search.search()
            else:
                chosen["best"] = search.recipe(options.samples)
            say(f"best: {chosen['best']}")
            chosen_path.write_text(json.dumps(chosen, indent=1))
            search.pack(chosen["best"])
        if "rivals" in steps:
            chosen["tower"] = search.seeds_and_rivals(chosen["best"])
            chosen_path.write_text(json.dumps(chosen, indent=1))
            search.pack(chosen["best"])
        if "evaluate" in steps:
            search.evaluate(chosen["best"])
    finally:
        if "best" in chosen:
            search.pack(chosen["best"])


if __name__ == "__main__":
    main()
