"""Which words of a text does an image support? Log-likelihood of each token with the image and without it.

python examples/explain_words.py photo.jpg "a dog runs through the snow"
"""

import argparse

import torch
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

from ig_captioner import DEFAULT_CHECKPOINT
from ig_captioner.processing_ig_captioner import load_rgb_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photo")
    parser.add_argument("text")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    options = parser.parse_args()
    model = AutoModelForZeroShotImageClassification.from_pretrained(options.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    inputs = processor(images=load_rgb_image(options.photo), text=options.text, return_tensors="pt")

    texts = model.compile_texts(inputs["input_ids"])
    with torch.no_grad():
        with_image = model.edge_log_likelihoods(texts, inputs["pixel_values"])[0]
        without = model.edge_log_likelihoods(texts)[0]

    print(f"{'token':>15} {'log P(t|I)':>11} {'log P(t)':>9} {'gain':>7}   nats")
    for edge in texts.trie.text_edges[0]:  # the text's tokens in order; a single text is a trie without branches
        token = processor.tokenizer.decode(texts.trie.edge_tokens[edge])
        gain = with_image[edge] - without[edge]
        bar = "+" * round(max(0.0, gain.item()))
        print(f"{token!r:>15} {with_image[edge]:11.2f} {without[edge]:9.2f} {gain:7.2f}   {bar}")
    print(f"{'text':>15} {with_image.sum():11.2f} {without.sum():9.2f} {(with_image - without).sum():7.2f}")


if __name__ == "__main__":
    main()
