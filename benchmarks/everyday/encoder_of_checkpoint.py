"""The frozen encoder of a checkpoint as a folder of its own, for `encoder_from`: no download, no conversion.

python -m benchmarks.everyday.encoder_of_checkpoint OUTPUT [--model FOLDER]
"""

import argparse

import torch

from ig_captioner import DEFAULT_CHECKPOINT, IGCaptionerForConditionalGeneration
from ig_captioner.checkpoint import load_processor


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    options = parser.parse_args(arguments)
    model = IGCaptionerForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    model.model.vision_model.save_pretrained(options.output)
    load_processor(options.model).image_processor.save_pretrained(options.output)


if __name__ == "__main__":
    main()
