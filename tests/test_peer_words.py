"""The words of Ultralytics, timm, torchvision, Lightning and Keras are understood, or answered with what does the job."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import resnetlab
from resnetlab import migrate_v01
from resnetlab.cli.main import app, run_command
from resnetlab.cli.peer_options import understand
from resnetlab.errors import AnsweredAttributes, UsageError, unknown_name_error
from resnetlab.inference.annotated import AnnotatedPrediction, Detector, Segmenter
from resnetlab.inference.explain import Explanation
from resnetlab.models.spec import Specification
from resnetlab.peer_words import NETWORK_ATTRIBUTES, translate
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import quick

UNDERSTOOD = """
train --model resnet18 --data photos = train photos --net=resnet18
train --arch resnet18 photos = train --net=resnet18 photos
train -a resnet18 photos = train --net=resnet18 photos
train data=photos model=resnet18 batch=8 = train photos --net=resnet18 --batch=8
train --data-path photos --train-crop-size 176 = train photos --set image_size=176
train x --batch-size 32 = train x --batch=32
train x --bs 32 = train x --batch=32
train x -b 32 = train x --batch=32
train x --per-device-train-batch-size=32 = train x --batch=32
train x --imgsz 160 = train x --set image_size=160
train x --img-size 160 = train x --set image_size=160
train x --input-size 160 = train x --set image_size=160
train x --optimizer adamw = train x --set optimizer=adamw
train x --opt adamw = train x --set optimizer=adamw
train x --sched cosine = train x --set schedule=cosine
train x --lr-scheduler cosine = train x --set schedule=cosine
train x --momentum 0.8 = train x --set momentum=0.8
train x --wd 1e-4 = train x --set weight_decay=1e-4
train x --weight-decay 1e-4 = train x --set weight_decay=1e-4
train x --smoothing 0.1 = train x --set label_smoothing=0.1
train x --label-smoothing 0.1 = train x --set label_smoothing=0.1
train x --mixup 0.2 = train x --set mixup=0.2
train x --reprob 0.1 = train x --set erasing=0.1
train x --drop-path 0.1 = train x --set stochastic_depth=0.1
train x --clip-grad 1.0 = train x --set clip_norm=1.0
train x --model-ema-decay 0.999 = train x --set ema_decay=0.999
train x --zero-init-residual = train x --set zero_init_last_bn=true
train x --sync-bn = train x --set bn_sync=true
train x --no-flip = train x --set flip=false
train x --print-freq 5 = train x --set log_every=5
train x --validation-split 100 = train x --set val_images=100
train x --weights m.safetensors = train x --start-from=m.safetensors
train x --output-dir runs/a = train x --out=runs/a
train x -o runs/a = train x --out=runs/a
train x --max-steps 7 = train x --steps=7
train x --iterations 7 = train x --steps=7
train x --num-workers 2 = train x --workers=2
train x -j 2 = train x --workers=2
train x --nproc-per-node 2 = train x --procs=2
train x --manual-seed 3 = train x --seed=3
train x --config paper-cifar = train x --recipe=paper-cifar
train x --cpu = train x --device=cpu
train x --amp = train x --precision=bf16
train x --fp16 = train x --precision=fp16
train --resume-from-checkpoint runs/a = train --resume=runs/a
detect train x --batch-size 2 --arch resnet50 = detect train x --batch=2 --net=resnet50
evaluate --model m.safetensors --data-path x --tta = evaluate m.safetensors --data=x --protocol=flip
evaluate --checkpoint m.safetensors --val-dir x = evaluate m.safetensors --data=x
predict --model m.safetensors --source a.png b.png --topk 3 = predict m.safetensors b.png --top=3 a.png
predict model=m.safetensors source=a.png = predict m.safetensors a.png
explain --weights m.safetensors --image a.png = explain m.safetensors a.png
export --model m.safetensors --format onnx --half = export m.safetensors --to=onnx --precision=bf16
inspect --arch resnet18 --num-classes 3 --imgsz 64 = inspect resnet18 --classes=3 --image-size=64
serve --model-path m.safetensors --port 1 = serve m.safetensors --port 1
train resnet18 photos = train --net=resnet18 photos
train photos preresnet110 --lr 1 = train photos --net=preresnet110 --lr 1
train resnet18 --data photos = train photos --net=resnet18
train photos --pretrained true --lr 1 = train photos --pretrained=true --lr 1
train photos --preset photos --kfold 5 = train photos --recipe=photos --folds=5
train photos --mixed-precision --img 64 = train photos --precision=bf16 --set image_size=64
train photos --rand-augment = train photos --set trivial_augment=true
train photos --compile --lr 1 = train photos --compile=on --lr 1
plan resnet50 --gpus 8 = plan --net=resnet50 --gpus 8
study degradation --smoke = study degradation --budget=smoke
study list = study
runs show runs/a = runs runs/a
models list = models
models --filter resnet* = models resnet*
recipes show photos = recipes photos
push m.safetensors --repo-id hf:me/a = push m.safetensors hf:me/a
""".strip().splitlines()  # fmt: skip


@pytest.mark.parametrize("row", UNDERSTOOD)
def test_the_options_of_other_programs_are_understood(row: str) -> None:
    theirs, _, ours = row.rpartition(" = ")
    assert understand(app, theirs.split()) == ours.split()


ANSWERED = {
    "train x --gpu 0": "--device cuda:1",
    "train x --gpus 2": "--procs 2",
    "train x --accelerator gpu": "--device cuda:1",
    "train x --val y": "DATA/val",
    "train x --val-dir y": "DATA/val",
    "train x --evaluate": "resnetlab evaluate MODEL --data DATA",
    "train x --test-only": "resnetlab evaluate MODEL --data DATA",
    "train x --num-classes 3": "the classes come from the data",
    "train x --in-chans 1": "the channels come from the data",
    "train x --checkpoint m": "--resume RUN",
    "train x --exist-ok": "--out",
    "train x --name a": "--out runs/mine",
    "train x --lr-step-size 30": "--set milestones=",
    "train x --patience 5": "--set early_stop=5",
    "train x --dropout 0.1": "--set stochastic_depth=0.1",
    "train x --freeze 10": "--set frozen_stages=C3",
    "train x --accumulate 4": "--set bn_batch=32",
    "train x --wandb": "--tracker tensorboard (or wandb",
    "train x --report-to mlflow": "--tracker",
    "train x --set num_classes=3": "the classes come from the data",
    "predict m.safetensors a.png --show": "--out FOLDER",
    "export m --to onnx --opset 17": "the opset",
    "fit x": "`resnetlab train`",
    "val x": "`resnetlab evaluate`",
    "infer x": "`resnetlab predict`",
    "detect val x": "`resnetlab detect evaluate`",
    "task=classify mode=train data=x": "a command comes first: resnetlab train",
    "train x mode=train": "the command is the first word",
    "train x --loss focal": "the cross entropy",
    "train x --save-best": "--set keep=best",
    "train x --fraction 0.1": "a smaller table or folder",
    "train x --test-size 0.2": "DATA/train and DATA/test",
    "train x --deterministic": "--verify-resume",
    "train x --grayscale": "--set channels=1",
    "train x --num-nodes 2": "torchrun … -m resnetlab train",
    "train x --wandb-project a": "WANDB_PROJECT",
    "train x --yes": "`resnetlab train --help` lists the options",
    "evaluate m --data x --batch-size 8": "batches are chosen by themselves",
    "evaluate m --data x --plots": "all figures are always computed",
    "evaluate m --data digits --out report.html": "--out is a folder, for evaluation.html",
    "export m --to onnx --precision bf16": "--to onnx writes fp32 or int8, not bf16.",
    "export m --to torch --precision int8": "int8 is written by --to onnx or openvino",
    "export m --to onnx --imgsz 64": "a model has its image size",
    "explain m a.png --method lime": "one method, Grad-CAM",
    "serve m --reload": "`resnetlab serve --help` lists the options",
    "evaluate m.safetensors photos": "did you mean: resnetlab evaluate m.safetensors --data photos",
    "evaluate photos m.safetensors --json": "did you mean: resnetlab evaluate m.safetensors --data photos",
    "detect evaluate m.safetensors boxes": "did you mean: resnetlab detect evaluate m.safetensors --data boxes",
    "data photos": "data has no command 'photos', but check, pack, audit; for example: resnetlab data check",
    "segment photos": "segment has no command 'photos', but train",
    "runs nowhere": "writes runs into the folder runs",
    "train digits --net resnet18.pth": "`resnetlab train DATA --start-from resnet18.pth`",
    "train digits --net microsoft/resnet-50": "'hf:microsoft/resnet-50'",
    "train digits --net resnet": "a name has the depth in it",
    "train imagenet": "ImageNet is downloaded by hand",
    "train mnist": "hf:NAME",
}


@pytest.mark.parametrize(("line", "answer"), ANSWERED.items(), ids=ANSWERED)
def test_the_others_are_answered_with_what_does_the_job(
    line: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(line.split()) == 2
    out, err = capsys.readouterr()
    assert not out and answer in err and err.count("\n") == 1


def test_a_path_that_is_there_is_not_taken_for_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("imagenet_mini").mkdir()
    Path("runs/a").mkdir(parents=True)
    for line, answer in {
        "train imagenet-mini": "did you mean 'imagenet_mini'?",
        "train imagenette": "hf:NAME",
        "train digits --net runs/a": "`resnetlab train DATA --start-from runs/a`",
    }.items():
        assert run_command(line.split()) == 2
        assert answer in capsys.readouterr().err


def test_our_own_words_pass_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "epochs=3").mkdir()
    for line in (
        "train photos --set lr=3 --set batch=4 --batch 8 --json",
        "train epochs=3 --steps 3",
        "evaluate m --data x --weights 1,2",
        "predict m - --top 3",
        "predict m -- -top.png --model",
        "train x --out --bs",
        "data check photos --no-timing",
        "train --help",
        "tran x --gpu 3",
    ):
        assert understand(app, line.split()) == line.split()


def test_values_of_a_recipe_are_understood_in_python() -> None:
    recipe = quick().with_values({"batch_size": "32", "wd": "0.1", "imgsz": "20"})
    assert (recipe.batch, recipe.weight_decay, recipe.image_size) == (32, 0.1, 20)
    with pytest.raises(UsageError, match="batch_size and batch are the same value; give it once"):
        quick().with_values({"batch": "32", "batch_size": "16"})
    with pytest.raises(UsageError, match="unknown key 'epochs'; the length in epochs is --epochs 10"):
        quick().with_values({"epochs": "3"})
    with pytest.raises(UsageError, match=r"val_split is how many images are held out, not the share 0\.1 of them"):
        quick().with_values({"val_split": "0.1"})
    with pytest.raises(UsageError, match="unknown optimizer 'SGD'; did you mean 'sgd'"):
        resnetlab.train(optimizer="SGD")


@pytest.mark.parametrize(
    ("name", "ours"),
    [("create_model", "build"), ("load_model", "load"), ("YOLO", "load"), ("detect", "the command `resnetlab detect`"),
     ("predict", "load(path).predict(image)"), ("fit", "train(data=…)"), ("Trainer", "train(data=…)")],
)  # fmt: skip
def test_other_packages_functions_are_answered(name: str, ours: str) -> None:
    assert not hasattr(resnetlab, name)
    with pytest.raises(UsageError, match="use ") as error:
        getattr(resnetlab, name)
    assert f"has no attribute {name!r}; use {ours}" in str(error.value)


def test_what_is_said_in_place_of_other_programs_attributes_is_there() -> None:
    net = resnetlab.build("resnet18", num_classes=2, device="meta")
    for word, ours in NETWORK_ATTRIBUTES.items():
        assert not hasattr(net, word), word
        assert ours.startswith(("resnetlab.", "torch.", "the command `")) or hasattr(net, re.findall(r"\w+", ours)[0])
    assert net.num_features == 512 and not hasattr(net, "nonsense")
    objects: list[type[AnsweredAttributes]] = [Detector, Segmenter, Explanation, AnnotatedPrediction]
    for kind in objects:
        own = {*dir(kind), *(field.name for field in fields(kind)), "load", "the", "len"}  # type: ignore[arg-type]
        for word, ours in kind.attribute_answers.items():
            assert word not in own and (re.findall(r"\w+", ours)[0] in own or "model.segment" in ours), (kind, word)


def test_the_names_of_version_01_lead_to_todays() -> None:
    keys = [*(field.name for field in fields(Recipe)), *(field.name for field in fields(Specification))]
    for old, new in (migrate_v01._RECIPE | migrate_v01._SPECIFICATION).items():
        assert f"did you mean {new!r}?" in str(unknown_name_error("key", old, keys)), old
    for old, command in {"engine": ["backend"], "pictures": ["images"], "input": ["channel_order", "classes"]}.items():
        assert translate(old, command) == command[0]
