#!/usr/bin/env bash
# Draws the pictures of the README anew, from the scenes of `tokenlabels demo`. Needs Chromium for the page.
set -euo pipefail
pictures=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

tokenlabels demo --out demo
tokenlabels show demo/labels --images "demo/images/*.tar" --key scene_000007 --out "$pictures/labels.png"
tokenlabels show demo/labels --images "demo/images/*.tar" --key scene_000007 --epoch 3 --seed 0 \
    --set data.batch_size=8 --device cpu --out "$pictures/epoch.png"
tokenlabels report demo/labels --images "demo/images/*.tar" --boxes json --out report.html
chromium --headless --no-sandbox --hide-scrollbars --force-device-scale-factor=1 --window-size=1400,1000 \
    --virtual-time-budget=5000 --screenshot="$pictures/report.png" "file://$work/report.html" 2> /dev/null
