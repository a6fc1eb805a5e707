"""Ranks labels for a photo with any captioner of the Hub, by likelihood and by information gain, token by token.

python examples/any_captioner.py Salesforce/blip-image-captioning-base photo.jpg cat dog horse
"""

import sys

from ig_captioner import CaptionScorer


def main(model: str, photo: str, *labels: str) -> None:
    scorer = CaptionScorer.from_pretrained(model)
    compiled = scorer.compile_labels(labels, ["a photo of a {}."])
    scores = scorer.score([photo], compiled)
    print(scorer.verification)
    for label, likelihood, gain in zip(
        labels, scores.caption_log_likelihood[0], scores.information_gain[0], strict=True
    ):
        print(f"{label}: log P(T|I) {likelihood:.2f}, information gain {gain:.2f}")
    for each in scorer.token_gains(photo, f"a photo of a {labels[0]}."):
        print(f"{each.token!r} {each.information_gain:+.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
