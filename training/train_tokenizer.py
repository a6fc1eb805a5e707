"""Trains the byte-level BPE tokenizer on the captions of shards and saves it as a transformers tokenizer folder.

    python -m training.train_tokenizer OUTPUT_DIR --vocab_size 3000 --shards 'data/flickr8k-train-*.tar' ...

A plain call of the tokenizer gives a text in scored form: its tokens and [EOS], no start token. Text is NFC-normalised,
lower-cased and stripped; a word has the same tokens at the start of a text and inside it. The result depends only on
the captions and their order. `AutoTokenizer.from_pretrained(OUTPUT_DIR)` loads it without remote code.
"""

import argparse
import logging
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ig_captioner.data.shards import BrokenSampleError, Skipped, find_shards, is_held_out, read_captions, read_shard


logger = logging.getLogger(__name__)

PAD, BOS, EOS, MASK = SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "[MASK]")  # ids 0, 1, 2, 3


def read_all_captions(paths: Iterable[str], holdout_fraction: float = 0.0) -> Iterator[str]:
    """Every caption of every sample, the held-out keys and the broken samples left out."""
    for path in paths:
        for item in read_shard(path):
            if isinstance(item, Skipped):
                logger.warning("skipped %s: %s", item.key, item.reason)
            elif not is_held_out(item[0], holdout_fraction):
                try:
                    yield from read_captions(item[1])
                except BrokenSampleError as error:
                    logger.warning("skipped %s: %s", item[0], error)


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int = 64) -> PreTrainedTokenizerFast:
    """A tokenizer with at most `vocab_size` tokens, the 4 special ones and the 256 bytes included."""
    smallest = len(SPECIAL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (special tokens and bytes), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A $B:1 {EOS}:1", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        mask_token=MASK,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("output_dir", help="folder of the tokenizer, for AutoTokenizer.from_pretrained")
    add("--shards", nargs="+", required=True, help="paths, globs or brace patterns of shards")
    add("--data_root", default="", help="folder of relative shard paths (default: the present one)")
    add("--vocab_size", type=int, default=3000, help="most tokens, bytes and special ones included (default: 3000)")
    add("--max_length", type=int, default=64, help="model_max_length in tokens, [EOS] included (default: 64)")
    add(
        "--holdout_fraction",
        type=float,
        default=0.0,
        help="share of the keys whose captions are left out, as in the training configuration (default: 0)",
    )
    return parser


def write_tokenizer(options: argparse.Namespace) -> str:
    """Trains and saves the tokenizer; returns a line about it. Raises ValueError where there are no captions."""
    captions = list(read_all_captions(find_shards(options.shards, options.data_root), options.holdout_fraction))
    if not captions:
        raise ValueError(f"no captions in {options.shards}")
    # Templated captions repeat by the thousand; each distinct text counts once, in order of first appearance.
    distinct = list(dict.fromkeys(captions))
    tokenizer = train_tokenizer(distinct, options.vocab_size, options.max_length)
    tokenizer.save_pretrained(options.output_dir)
    lengths = [len(ids) for ids in tokenizer(distinct)["input_ids"]]
    return (
        f"{options.output_dir}: {len(tokenizer)} tokens from {len(distinct)} distinct captions "
        f"({len(captions)} in all); length mean {sum(lengths) / len(lengths):.1f}, longest {max(lengths)}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        print(write_tokenizer(options))
    except (OSError, ValueError) as error:  # no shard, no caption, a vocabulary that is too small
        parser.exit(2, f"training.train_tokenizer: error: {error}\n")


if __name__ == "__main__":
    main()
