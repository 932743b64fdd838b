#!/bin/sh
# Train on in the background, from where the last session left the queue: training/continue.sh PHOTOS SECONDS [NAME ...]
# PHOTOS holds train/ and dev/ (training/photos.md). The log is runs/continue.log; runs/pack is made when it is missing.
# A network that is done is copied to training/state/NAME; before that, runs/NAME/*.safetensors are never older than a minute.
set -eu
photos=$1
seconds=$2
shift 2
cd "$(dirname "$0")/.."
python=.venv/bin/python
mkdir -p runs
if ! [ -e runs/pack/complete ]; then
    OMP_NUM_THREADS=1 nice -n 19 "$python" -m training.pack "$photos" runs/pack --quality 0
    touch runs/pack/complete
fi
setsid nohup nice -n 19 "$python" -m training.recipe runs/pack "$seconds" "$@" >> runs/continue.log 2>&1 &
echo "training in process $!; follow it with: tail -f runs/continue.log runs/*/log.jsonl"
