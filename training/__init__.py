"""Training of IG captioners: configuration, data, optimisation and one linear script (`training/train.py`).

Run it as a module, `accelerate launch -m training.train --config FILE.yaml`. The package may import
`ig_captioner`; nothing in `ig_captioner` imports it, and it never imports `conversion`.
"""
