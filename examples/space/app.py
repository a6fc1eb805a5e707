"""The web demo as a Hugging Face Space; README.md says how to make one. The variable MODEL names another checkpoint."""

import os

from ig_captioner import DEFAULT_CHECKPOINT, demo


if __name__ == "__main__":
    demo.launch(os.environ.get("MODEL", DEFAULT_CHECKPOINT), host="0.0.0.0", port=7860)
