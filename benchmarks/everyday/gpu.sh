#!/bin/sh
# The recipe of the shipped checkpoint again, and what belongs beside it, on one GPU.
#
#     DATA=/path/to/shards sh benchmarks/everyday/gpu.sh OUTPUT [--dry-run]
#
# Features; then at the same time three seeds of the recipe and a run without a fifth of the class names, SAMPLES each;
# four variants of a dual encoder, and three seeds of the best at as many samples; templates and prior weight; then
# `ig-captioner evaluate` of all these, and the linear probe. OUTPUT gets what benchmarks/everyday/gpu.py says. A second call
# goes on where the first one stopped. The encoder is that of the shipped checkpoint, unless ENCODER names a folder.
# On an H200 with 16 cores, at 1,720,320 samples: features 173 s, four runs 187 s, their figures 30 s, variants of the dual
# encoder 77 s, its seeds 141 s; the choice of templates was cut short after 157 s, the evaluation was not run there.
# --dry-run is the same on a few photos, for a machine without a GPU; it shows that every step runs, not how well.
set -eu
cd "$(dirname "$0")/../.."
output=$1
python=${PYTHON:-python}
data=${DATA:-data}
work=${WORK:-runs/everyday-gpu}
samples=${SAMPLES:-861184} minutes=5 at_once=14 limit=900
small=
if [ "${2:-}" = --dry-run ]; then
    work=${WORK:-runs/everyday-dry}
    [ -e "$work/data" ] || "$python" -m benchmarks.everyday.cut_shards "$data" "$work/data" --samples 60
    data=$work/data samples=2048 at_once=2 limit=3000
    small="--data.sources.tiny_imagenet.views 1 --data.sources.flickr8k.views 1 --data.sources.caltech101.views 1"
    small="$small --data.feature_cache.batch_size 16 --data.feature_cache.num_workers 0 --data.num_workers 0"
    small="$small --batch_size 128 --log_every_steps 5 --data.sources.caltech101.holdout_fraction 0.2"
    small="$small --data.sources.tiny_imagenet.holdout_fraction 0.2 --data.sources.flickr8k.holdout_fraction 0.2"
fi
if [ -z "${ENCODER:-}" ]; then
    ENCODER=$work/encoder
    [ -e "$ENCODER/config.json" ] || "$python" -m benchmarks.everyday.encoder_of_checkpoint "$ENCODER"
fi
timeout "$limit" "$python" -u -m benchmarks.everyday.gpu --work "$work" --data "$data" --encoder "$ENCODER" \
    --output "$output" --samples "$samples" --minutes "$minutes" --at_once "$at_once" --overrides="$small" \
    ${small:+--limit 40 --batch_size 128}
