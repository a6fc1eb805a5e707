"""What K labels cost behind one image, by arithmetic, for public captioners: decoder tokens, FLOP and cache.

    python -m benchmarks.captioner_arithmetic

Texts are ImageNet's names in a template, in tokens of the shipped checkpoint; other tokenizers differ by some per cent.
Two FLOP per weight and token, of the image encoder and of the decoder; attention is left out. Pairwise is one pass of
the model per text, image encoder included. Caches are of 16 bits per number.
"""

from dataclasses import dataclass

from ig_captioner import DEFAULT_CHECKPOINT, IGCaptionerProcessor
from ig_captioner.data.prompts import load_prompts
from ig_captioner.label_trie import build_trie


TEMPLATE = "a photo of a {}."
LABELS = (10, 100, 1000)


@dataclass(frozen=True)
class Decoder:
    """Sizes that a model's config.json says.

    Args:
        weights: of the decoder, head included.
        prefix: tokens of image and prompt that the decoder reads.
        cached: numbers per token of the cache, 2 x layers x width of keys.
        cached_tokens: of the prefix, or of the image where the decoder cross-attends to it.
        encoder: weights of the image encoder times the tokens that it reads.
    """

    weights: float
    prefix: int
    cached: int
    cached_tokens: int
    encoder: float


DECODERS = {
    "LLaVA-1.5-7B": Decoder(6.74e9, 576 + 40, 2 * 32 * 4096, 576 + 40, 0.304e9 * 577),
    "PaliGemma-3B": Decoder(2.51e9, 256 + 5, 2 * 18 * 256, 256 + 5, 0.428e9 * 256),
    "BLIP-base": Decoder(0.14e9, 1, 2 * 12 * 768, 577, 0.086e9 * 577),
    "SmolVLM-256M": Decoder(0.135e9, 17 * 64 + 60, 2 * 30 * 192, 17 * 64 + 60, 0.093e9 * 17 * 1024),
}


def count_tokens(number: int) -> tuple[int, int]:
    """Tokens of all texts, and nodes of their trie."""
    tokenizer = IGCaptionerProcessor.from_pretrained(DEFAULT_CHECKPOINT).tokenizer
    labels = load_prompts("imagenet").class_names[:number]
    encoded = tokenizer([TEMPLATE.replace("{}", label) for label in labels], padding=True, return_tensors="pt")
    trie = build_trie(encoded["input_ids"], encoded["attention_mask"], 0)
    return int(trie.lengths.sum()), len(trie.nodes)


def main() -> None:
    print("| model | K | TFLOP pairwise | rows | tree | pairwise / tree | cache of rows, GiB | of the tree |")
    print("|---|---|---|---|---|---|---|---|")
    for number in LABELS:
        tokens, nodes = count_tokens(number)
        for name, decoder in DECODERS.items():
            ways = number * decoder.prefix + tokens, decoder.prefix + tokens, decoder.prefix + nodes
            encodings = number, 1, 1
            tera = [
                2 * (decoder.weights * read + decoder.encoder * encoded) / 1e12
                for read, encoded in zip(ways, encodings, strict=True)
            ]
            cache = 2 * decoder.cached * decoder.cached_tokens / 2**30
            figures = " | ".join(f"{each:.3g}" for each in (*tera, tera[0] / tera[2], number * cache, cache))
            print(f"| {name} | {number:,} | {figures} |")


if __name__ == "__main__":
    main()
