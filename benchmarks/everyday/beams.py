"""Which beam search writes the best captions: CIDEr-D on captioned training photos that no run has seen.

    python -m benchmarks.everyday.beams --data 'flickr8k-train-*.tar' --output FILE.json [--held_out 0.04]

The photos are those that `data.sources.*.holdout_fraction` keeps from the training. The setting that is best here goes
to `ig-captioner evaluate captioning` on the test photos, once.
"""

import argparse
import json
from itertools import product
from pathlib import Path

from ig_captioner import DEFAULT_CHECKPOINT, CaptionScorer
from ig_captioner.data.samples import Samples, captioned, separate
from ig_captioner.data.shards import is_held_out
from ig_captioner.evaluation.captioning import cider_d, generate_captions
from ig_captioner.evaluation.report import cpu_model, git_commit, weights_digest


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--data", required=True, help="captioned photos: shards, a folder or a data set")
    parser.add_argument("--held_out", type=float, default=0.04, help="the training's holdout_fraction")
    parser.add_argument("--num_beams", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--length_penalties", type=float, nargs="+", default=[0.0, 1.0, 2.0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    samples = Samples(options.data, captioned)
    every = list(samples)
    chosen = [sample for key, sample in zip(samples.keys, every, strict=True) if is_held_out(key, options.held_out)]
    images, references = separate(chosen)
    images, scorer = list(images), CaptionScorer.from_pretrained(options.model, dtype=options.dtype)
    settings = [(1, 1.0), *product(options.num_beams, options.length_penalties)]
    rows = []
    for beams, penalty in settings:
        search = {"num_beams": beams} | ({"length_penalty": penalty} if beams > 1 else {})
        cider = 100 * cider_d(generate_captions(scorer, images, **search), references).mean().item()
        rows.append({"num_beams": beams, "length_penalty": penalty, "CIDEr-D %": round(cider, 1)})
        print(rows[-1], flush=True)
    about = {"photos": len(images), "dtype": options.dtype, "commit": git_commit(), "cpu": cpu_model()}
    about["weights_sha256"] = weights_digest(str(options.model))
    options.output.write_text(json.dumps({**about, "settings": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
