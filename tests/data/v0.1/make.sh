#!/usr/bin/env bash
# Made these files with residuum 0.1 (commit b588705); README.md says what they are. Later versions cannot make them again.
#   PYTHON=…/.venv/bin/python tests/data/v0.1/make.sh      in a clone of that commit with its development environment
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python}
export OMP_NUM_THREADS=1
bits=../../../scripts/bits three=../../../docs/three.png
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf classifier unfinished exports photos.safetensors detector.safetensors segmenter.safetensors expected.json

"$python" - "$work" <<PY
import importlib.machinery, importlib.util, pathlib, sys
loader = importlib.machinery.SourceFileLoader("bits", "$bits")
bits = importlib.util.module_from_spec(importlib.util.spec_from_loader("bits", loader))
loader.exec_module(bits)
bits.make_images(pathlib.Path(sys.argv[1]) / "images")
bits.make_scenes(pathlib.Path(sys.argv[1]) / "scenes")
PY

residuum() { "$python" -m residuum "$@"; }
common=(--seed 3 --device cpu --set threads=1 --set precision=fp32)
digits=(digits --net resnet8 --set widths=4,8,16 --compile off "${common[@]}")

# a finished run
residuum train "${digits[@]}" --steps 100 --out classifier --json
residuum predict classifier/model.safetensors "$three" --top 10 --device cpu --json >"$work/predict.json"
residuum evaluate classifier/model.safetensors --data digits --device cpu --precision fp32 --out "$work" --json >"$work/evaluate.json"

# its exports, proved on the images in the model file
mkdir exports
for to in onnx:onnx openvino:xml torch:pt2; do
  residuum export classifier/model.safetensors --to "${to%:*}" --out "exports/classifier.${to#*:}" --json
done
residuum export classifier/model.safetensors --to torchvision --out exports/classifier.pth
residuum export classifier/model.safetensors --to torchvision --out exports/classifier.safetensors

# a run that SIGTERM stopped after step 30 or so, and the weights that residuum 0.1 brings it to
"$python" -m residuum train "${digits[@]}" --steps 400 --set ema=0.9 --set bn_batch=32 --out unfinished &
until grep -qs '"step": 30,' unfinished/metrics.jsonl; do sleep 0.05; done
kill -TERM $!
wait $! && exit 1 # it must not have come to its end
cp -r unfinished "$work/unfinished"
(cd "$work" && residuum train --resume unfinished --json)

# a model that learnt on images in a folder: bottlenecks, pre-activation, per-pixel mean, images held out, fingerprints
(cd "$work" && residuum train images --recipe photos --net resnet50 --steps 20 --compile off "${common[@]}" \
  --set widths=4,4,8,8 --set depths=1,1,1,1 --set order=preact --set boundary=raw --set stride_site=3x3 --set size=24 \
  --set resize=28 --set "normalise=per-pixel mean" --set held_out=9 --set batch=8 --set ema=0.9 --set trunk_lr=0.5 --out photos --json)
(cd "$work" && cp photos/model.safetensors "$OLDPWD/photos.safetensors")

# a detector (form c4: the two layers of fpn's head alone are 4 MB) and a segmenter
tiny=(--set widths=8,8,16,16 --set depths=1,1,1,1 --set size=64 --set longest=96 --set sides=48,80 --set batch=4)
(cd "$work" && residuum detect train scenes --recipe boxes --steps 60 "${common[@]}" "${tiny[@]}" --set form=c4 \
  --set regions=16 --out boxes --json)
(cd "$work" && residuum segment train scenes --recipe masks --steps 60 "${common[@]}" "${tiny[@]}" --out masks --json)
cp "$work/boxes/model.safetensors" detector.safetensors
cp "$work/masks/model.safetensors" segmenter.safetensors
residuum detect predict detector.safetensors "$work/scenes/JPEGImages/s19.png" --score 0.2 --device cpu >"$work/detect.json"
residuum segment predict segmenter.safetensors "$work/scenes/JPEGImages/s19.png" --device cpu >"$work/segment.json"
residuum predict photos.safetensors "$work/images/val/class1/3.png" --device cpu --json >"$work/photos.json"
cp "$work/scenes/JPEGImages/s19.png" scene.png
cp "$work/images/val/class1/3.png" photo.png
rm -rf {classifier,unfinished}/{report.html,.lock}

"$python" - "$work" <<PY
import importlib.machinery, importlib.util, json, pathlib, sys
loader = importlib.machinery.SourceFileLoader("bits", "$bits")
bits = importlib.util.module_from_spec(importlib.util.spec_from_loader("bits", loader))
loader.exec_module(bits)
work, models = pathlib.Path(sys.argv[1]), ("classifier/model", "photos", "detector", "segmenter")
read = lambda name: json.loads((work / name).read_text())
finished = work / "unfinished"
expected = {
    "weights": {f"{name}.safetensors": bits.weights_digest(pathlib.Path(f"{name}.safetensors")) for name in models},
    "unfinished": {
        "weights": bits.weights_digest(finished / "model.safetensors"),
        "stopped_after": max(int(file.stem.split("-")[1]) for file in pathlib.Path("unfinished/checkpoints").iterdir()),
        "last_loss": bits.last_loss(finished / "metrics.jsonl"),
        "result": read("unfinished/result.json"),
    },
    "predict": {"classifier": read("predict.json"), "photos": read("photos.json")},
    "evaluate": read("evaluate.json"),
    "detect": {"predict": read("detect.json"), "result": read("boxes/result.json")},
    "segment": {"predict": read("segment.json"), "result": read("masks/result.json")},
    "environment": bits.environment(),
}
text = json.dumps(expected, indent=1, sort_keys=True).replace(str(work) + "/", "")
pathlib.Path("expected.json").write_text(text + "\n")
PY
