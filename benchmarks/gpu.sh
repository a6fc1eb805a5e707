#!/bin/sh
# All that wants a GPU, in one command of at most ten minutes on one H100 or H200:
#
#     [PARTS="check scoring"] sh benchmarks/gpu.sh FOLDER [--dry-run]
#
# Writes reports to FOLDER. Each part has a time limit of its own, and a part that fails does not stop the others; the
# exit status is 1 if any did. PARTS names those to run. --dry-run is the same with the smallest sizes, for a machine
# without a GPU.
#
#   device_scores.json    scores: float32 and bfloat16, eager and sdpa, compiled, against float32 on the CPU
#   scoring.json, .md     time at K = 10, 100, 1,000 labels and up to 256 images beside CLIP's image tower alone
#   training.json, .md    the training step beside the captioning step and transformers' VisionEncoderDecoder
#   check.json            training: FSDP2 (start, step, save, resume), compilation, gradient checkpointing; MFU of B/16
set -u
cd "$(dirname "$0")/.."
folder=$1
quick=${2:+--quick}
patience=${2:+5}
patience=${patience:-1}
python=${PYTHON:-python}
parts=${PARTS:-device_scores training scoring check}
mkdir -p "$folder"
failed=0

part() {  # part NAME SECONDS COMMAND... (five times the seconds in a dry run)
    name=$1 limit=$(($2 * patience))
    shift 2
    case " $parts " in *" $name "*) ;; *) return ;; esac
    echo "== $name"
    if timeout "$limit" "$python" -m "$@" >"$folder/$name.log" 2>&1; then
        tail -n 40 "$folder/$name.log"
    else
        echo "FAILED: $name (exit status $?)"
        tail -n 40 "$folder/$name.log"
        failed=1
    fi
}

part device_scores 150 benchmarks.device_scores $quick --output "$folder/device_scores.json"
if [ -n "$quick" ]; then
    part training 240 benchmarks.training --quick --only loss --output "$folder/training.json"
else
    part training 60 benchmarks.training --quick --only step --only peer --output "$folder/training.json"
    part scoring 110 benchmarks.scoring --output "$folder/scoring.json"
fi
part check 280 training.check_gpu ${quick:+--only tiny} --output "$folder/check.json"
exit $failed
