"""The words that people bring from Ultralytics, timm, torchvision, Lightning and Keras, and from our version 0.1: our word for
each, or an answer.

A word is written with underscores and without leading dashes: "batch_size" stands for `--batch-size` and `batch_size=`.
"""

from __future__ import annotations

from collections.abc import Collection

# Our word: theirs. A word may stand in several rows: the first one that the command has counts. MODEL, DATA and IMAGES are
# a command's positional arguments.
_SYNONYMS = {
    "net": "model model_name arch architecture backbone network a m",
    "NET": "model model_name arch architecture backbone network a m",
    "MODEL": "model m checkpoint ckpt ckpt_path checkpoint_path model_path weights pretrained pretrained_weights file load",
    "start_from": "weights checkpoint_path finetune_from init_from initial_checkpoint load_weights pretrained_weights",
    "channel_order": "input",
    "DATA": "data dataset data_path data_root root train_dir train_data train data_set d",
    "data": "dataset data_path data_root root val val_dir test_dir data_set d",
    "IMAGES": "source input image images input_path img",
    "batch": "batch_size bs train_batch_size per_device_train_batch_size b",
    "epochs": "epoch max_epochs num_epochs num_train_epochs n_epochs e",
    "steps": "max_steps iterations iters max_iter num_steps train_steps",
    "lr": "learning_rate lr0 base_lr",
    "image_size": "imgsz img_size img input_size crop_size train_crop_size size resolution",
    "eval_resize": "val_resize_size test_input_size resize",
    "classes": "num_classes nc n_classes class_names labels names",
    "channels": "in_chans in_channels ch input_channels",
    "optimizer": "opt optim",
    "schedule": "sched scheduler lr_scheduler lr_schedule",
    "weight_decay": "wd l2 decay",
    "label_smoothing": "smoothing",
    "erasing": "reprob random_erase re_prob",
    "stochastic_depth": "drop_path drop_path_rate",
    "clip_norm": "clip_grad clip_grad_norm max_grad_norm gradient_clip_val clip",
    "ema_decay": "model_ema_decay ema",
    "warmup_steps": "num_warmup_steps warmup_iters",
    "flip": "hflip fliplr",
    "trivial_augment": "auto_augment autoaugment aa rand_augment randaugment",
    "recompute": "gradient_checkpointing grad_checkpointing",
    "bn_sync": "sync_bn sync_batchnorm syncbn",
    "frozen_bn": "freeze_bn",
    "zero_init_last_bn": "zero_init_residual zero_gamma",
    "log_every": "print_freq log_interval log_every_n_steps logging_steps record_every",
    "eval_every": "val_interval check_val_every_n_epoch eval_steps judge_every",
    "checkpoint_minutes": "save_period save_steps",
    "val_images": "val_size val_split validation_split val_fraction held_out",
    "out": "output output_dir out_dir save_dir logdir log_dir result_dir default_root_dir run_dir o",
    "resume": "resume_from resume_from_checkpoint",
    "recipe": "config cfg config_file c preset",
    "workers": "num_workers dataloader_num_workers j",
    "procs": "nproc num_processes nproc_per_node world_size num_gpus",
    "data_dir": "cache_dir download_dir",
    "seed": "random_state manual_seed random_seed",
    "precision": "dtype amp_dtype",
    "top": "topk top_k k",
    "min_score": "conf threshold score_threshold conf_thres confidence score",
    "to": "format export_format",
    "split": "subset",
    "backbone_lr_scale": "trunk_lr",
    "activation_order": "order",
    "stride_in": "stride_site",
    "zero_pad": "zeros",
    "preact_transition": "boundary",
    "backend": "engine",
    "images": "pictures",
    "image": "images source img",
    "name": "model model_name arch architecture net",
    "PATTERN": "filter name search",
    "pattern": "filter name search",
    "TO": "repo_id repo hub_model_id",
    "folds": "kfold k_fold n_splits",
    "compile": "torch_compile",
    "device": "map_location",
    "on_evaluate": "callback callbacks on_epoch_end",
    "progress": "verbose progress_bar",
    "json": "as_json",
    "1crop": "single_crop center_crop centre_crop centercrop onecrop one_crop crop",
    "10crop": "tencrop ten_crop 10_crop tencrops",
    "multiscale:224,256,384,480,640": "multi_scale ms",
}
_FLAGS = {  # a word without a value: our option and its value
    "cpu": ("device", "cpu"),
    "no_cuda": ("device", "cpu"),
    "cuda": ("device", "cuda"),
    "mps": ("device", "mps"),
    "amp": ("precision", "bf16"),
    "half": ("precision", "bf16"),
    "fp16": ("precision", "fp16"),
    "bf16": ("precision", "bf16"),
    "int8": ("precision", "int8"),
    "mixed_precision": ("precision", "bf16"),
    "use_amp": ("precision", "bf16"),
    "no_amp": ("precision", "fp32"),
    "smoke": ("budget", "smoke"),
    "tta": ("protocol", "flip"),
    "test_time_augmentation": ("protocol", "flip"),
}
_ANSWERS = {  # words that have no counterpart: what does the job
    "epochs epoch": "the length in epochs is --epochs 10 (in Python epochs=10).",
    "max_epochs num_epochs n_epochs": "the length in epochs is --epochs 10.",
    "gpu gpus gpu_id gpu_ids devices accelerator strategy":
        "a GPU is chosen with --device cuda:1, several share a run with --procs 2; without either, a GPU is taken "
        "if there is one.",
    "evaluate test_only eval test validate": "a model is evaluated with: resnetlab evaluate MODEL --data DATA.",
    "val val_dir validation validation_data test_dir":
        "put the images into DATA/val (beside DATA/train), or hold some of the training images out with --set val_images=500.",
    "num_classes nc classes n_classes class_names":
        "the classes come from the data: one for each folder of images, or each label of a table.",
    "checkpoint ckpt ckpt_path":
        "continue a run with --resume RUN; start from a model's weights with --start-from MODEL.",
    "start_epoch": "a run continues at its last step: --resume RUN.",
    "exist_ok overwrite force":
        "a run never overwrites another; choose a new folder with --out, or go on with --resume RUN.",
    "project name experiment run_name exp": "name the run's folder with --out runs/mine.",
    "lr_step_size step_size decay_epochs lr_gamma gamma":
        "the learning rate is divided by 10 at --set milestones=3000,4000 (steps); other schedules: --set schedule=cosine.",
    "patience early_stopping patience_epochs":
        "--set early_stop=5 ends a run after as many evaluations without a new lowest held-out error (--set keep=best keeps "
        "its weights), --set schedule=plateau divides the learning rate instead.",
    "dropout": "the networks of the papers have no dropout; stochastic depth is --set stochastic_depth=0.1.",
    "freeze freeze_layers freeze_backbone":
        "--set frozen_stages=C3 keeps the first layers of --start-from up to that map (C1 the stem … C5), --set "
        "backbone_lr_scale=0.1 slows all but the last layer, --set frozen_bn=true keeps BN as it is.",
    "accumulate gradient_accumulation_steps accumulate_grad_batches":
        "gradients are accumulated over micro-batches: --batch 256 --set bn_batch=32.",
    "distributed ddp local_rank rank num_nodes nnodes master_addr master_port dist_url":
        "--procs 2 starts processes here; on several machines: torchrun … -m resnetlab train …",
    "wandb tensorboard mlflow trackio logger report_to log_with wandb_project wandb_entity use_wandb":
        "trackers get a run's figures with --tracker tensorboard (or wandb, mlflow, trackio); a tracker's own variables "
        "(WANDB_PROJECT, MLFLOW_TRACKING_URI) name its project.",
    "verbose v log_level": "progress is printed to standard error; --json prints the result as one document.",
    "quiet": "progress is printed to standard error: add 2>/dev/null; --json prints the result as one document.",
    "show": "--out FOLDER writes images, --json prints the predictions.",
    "save": "--out writes the results into a file or folder.",
    "iou": "boxes are merged at the detector's own threshold; --min-score chooses which are shown.",
    "augment":
        "augmentation belongs to the recipe (`resnetlab recipes` lists them): --set trivial_augment=true, --set flip=false.",
    "set":
        "a run is trained with its values (a study sets its own): resnetlab train DATA --set key=value; runs are shown "
        "beside each other by: resnetlab runs compare RUN RUN.",
    "task mode": "the command is the first word: resnetlab train DATA, evaluate, predict, export; boxes and masks: resnetlab "
        "detect train DATA, segment train DATA.",
    "loss criterion loss_fn": "the loss is the cross entropy: --set label_smoothing=0.1, --set class_weights=balanced; data of "
        "several classes per image take the binary one.",
    "save_best keep_best load_best_model_at_end": "--set keep=best keeps the weights with the lowest held-out error.",
    "deterministic cudnn_deterministic benchmark":
        "runs are bit-identical without it: `resnetlab train DATA --verify-resume` checks that here.",
    "fraction limit max_images max_samples max_train_samples limit_train_batches num_samples":
        "all images are used; a smaller table or folder is a smaller data set, --steps or --epochs make a run short.",
    "test_size test_split train_split train_size":
        "a fifth of each class is kept for the test; folders DATA/train and DATA/test, or a split column, decide otherwise.",
    "cache cache_images": "images are decoded ahead of the network (--workers 4), and not kept in memory.",
    "channels_last": "networks are in channels_last by themselves.",
    "normalize": "mean and standard deviation are computed from the training images.",
    "grayscale greyscale gray grey": "--set channels=1 reads images in grey.",
    "metrics confusion_matrix plots plot": "all figures are always computed: evaluation.html shows them; "
        "--json prints them.",
    "target target_class": "the class with the highest score is explained, of all or of those of --classes.",
    "method layer target_layer": "`resnetlab explain` has one method, Grad-CAM on the last stage, and shows every block.",
    "dry_run": "the cost is printed before the work begins; Ctrl-C stops it, and nothing is lost.",
    "X y x X_train y_train x_train": "images and labels are one pair, the data: train((X, y)).",
    "mean std": "mean and standard deviation are computed from the training images.",
    "opset": "the opset of exported ONNX files is fixed; other programs convert it.",
    "dynamic": "exported files take any number of images of any size.",
    "model_ema": "give its decay: --set ema_decay=0.9998.",
    "in_chans in_channels ch": "the channels come from the data: the images' own, or --set channels=N.",
}  # fmt: skip
ANSWERS = {word: answer for words, answer in _ANSWERS.items() for word in words.split()}
REPLACING = ("exist_ok", "overwrite", "force")  # their answer is for runs: other commands replace files
_FIXED = {  # words for values of a recipe, where a model is used and not trained
    "batch batch_size bs b": "outside training, batches are chosen by themselves, and made smaller where memory is short.",
    "imgsz img_size img input_size image_size size":
        "a model has its image size, and resizes every image itself; exported files do so too.",
}  # fmt: skip
FIXED_ANSWERS = {word: answer for words, answer in _FIXED.items() for word in words.split()}
NETWORK_ANSWERS = {  # arguments of other programs' networks that are no value of a specification here
    word: answer
    for words, answer in {
        "features_only out_indices return_layers": "resnetlab.models.backbone.Features(net) gives the maps as a "
            "list, with timm's feature_info; net.features(images) as a dictionary, C1 to C5.",
        "global_pool": "net.forward_features(images) gives the last map, before pooling.",
        "drop_path_rate drop_path drop_rate dropout":
            "a network has no dropout; stochastic depth belongs to training: train(…, stochastic_depth=0.1).",
        "output_stride replace_stride_with_dilation dilation":
            "resnetlab.models.backbone.dilate changes a network in place.",
        "norm_layer act_layer activation":
            "the networks have BN and ReLU, in the order that activation_order says; torch.nn.SyncBatchNorm."
            "convert_sync_batchnorm(net) changes the kind of BN.",
        "zero_init_residual zero_init_last": "it belongs to training: train(…, zero_init_last_bn=True).",
        "dtype half": "a network is float32; convert it as any module: build(…).half().",
        "channels_last memory_format": "build(…).to(memory_format=torch.channels_last) converts it, as any module.",
        "checkpoint_path checkpoint": "weights=FILE loads a model file or a weight file.",
        "groups width_per_group cardinality base_width": "ResNeXt and wide residual networks are not built here.",
    }.items()
    for word in words.split()
}  # fmt: skip
MODEL_ATTRIBUTES = {  # of other programs' models: ours
    "cpu": 'to("cpu")', "cuda": 'to("cuda")', "half": 'load(path, precision="bf16")', "model": "net", "network": "net",
    "module": "net", "backbone": "net", "parameters": "net.parameters()", "state_dict": "net.state_dict()",
    "named_parameters": "net.named_parameters()", "train": "resnetlab.train(data=…, start_from=path)",
    "fit": "resnetlab.train(data=…, start_from=path)", "val": "evaluate(data)", "test": "evaluate(data)",
    "score": "evaluate(data)", "validate": "evaluate(data)", "predict_proba": "predict(image, top=len(model.classes))",
    "forward": "predict(image), or net(tensor) for logits", "features": "embed(images)", "forward_features": "embed(images)",
    "encode": "embed(images)", "get_features": "embed(images)", "gradcam": "explain(image)", "image_size":
    "preprocessing.image_size", "imgsz": "preprocessing.image_size", "input_size": "preprocessing.image_size",
    **dict.fromkeys(
        ("transform", "transforms", "preprocess", "preprocessor", "processor"),
        "preprocessing, which predict applies; the input of net is preprocessing.normalise(preprocessing(image)[None])",
    ),
    **dict.fromkeys(("class_to_idx", "idx_to_class", "id2label", "label2id"), "classes, in the order of the outputs"),
    "finetune": "resnetlab.train(data=…, start_from=path)",
    "num_classes": "len(model.classes)", "class_names": "classes", "labels": "classes", "info": "describe()",
    "summary": "describe()", "config": "recipe", "push_to_hub": "the command `resnetlab push`",
    "save_pretrained": "save(file)", "serve": "the command `resnetlab serve`",
    "img_size": "preprocessing.image_size", "layers": "net", "weights": "net.state_dict()", "threshold": "thresholds",
    **dict.fromkeys(("accuracy", "history", "top1_error"), "metrics, of the run; evaluate(data) for other data"),
    **dict.fromkeys(("predict_batch", "predict_image", "inference", "infer", "classify"), "predict(images)"),
    **dict.fromkeys(("similar", "neighbours", "neighbors"), "the command `resnetlab neighbours`"),
    **dict.fromkeys(("compile", "fuse"), "net, a torch.nn.Module; predict folds BN by itself"),
    "quantize": "export(file, precision='int8')", "freeze": "resnetlab.train(data=…, start_from=path, frozen_stages='C3')",
    "load_weights": "resnetlab.load(path)", "plot": "explain(image).overlay", "gradients": "explain(image)",
}  # fmt: skip
_DEFAULT_CONFIGURATION = "resnetlab.load(path).preprocessing of a model file: size, mean and standard deviation"
_NETWORK_ATTRIBUTES = {  # of other programs' networks, and of the model that a network is a part of: ours
    "feature_info": "resnetlab.models.backbone.Features(net).feature_info",
    "forward_intermediates get_intermediate_layers extract_features":
        "features(images), which gives the map of every stage, C1 to C5",
    "head classifier last_linear": "fc",
    "avgpool global_pool pool": "forward_head(net.forward_features(images), pre_logits=True) for the averages of the last map",
    "relu act1 act": "features(images)['C1'], the map after the stem's ReLU",
    "stem": "conv1, bn1 and maxpool",
    "inplanes": "spec.widths[0]",
    "out_channels head_hidden_size embed_dim feature_dim": "num_features",
    "in_chans in_channels": "spec.channels",
    "default_cfg pretrained_cfg input_size image_size mean std": _DEFAULT_CONFIGURATION,
    "preprocessing transform transforms preprocess": _DEFAULT_CONFIGURATION,
    "classes class_names": "num_classes; a model file has their names: resnetlab.load(path).classes",
    "config": "spec",
    "drop_rate drop_path_rate": "resnetlab.train(data=…, stochastic_depth=0.1)",
    "grad_checkpointing gradient_checkpointing_enable": "set_grad_checkpointing()",
    "group_matcher no_weight_decay parameter_groups": "named_parameters()",
    "freeze": "resnetlab.models.backbone.freeze(net, 'C3'), up to the map C3",
    "predict predict_proba": "resnetlab.load(path).predict(image), or net(tensor) for logits",
    "embed explain": "resnetlab.load(path), whose methods embed and explain take images",
    "evaluate val test validate score": "resnetlab.load(path).evaluate(data)",
    "fit finetune": "resnetlab.train(data=…, net=net)",
    "export": "resnetlab.load(path).export(file)",
    "save save_pretrained": "torch.save(net.state_dict(), file); the command `resnetlab import` makes a model file of it",
    "load from_pretrained load_weights": "resnetlab.build(name, weights=path)",
    "summary info": "the command `resnetlab inspect NAME`",
}  # fmt: skip
NETWORK_ATTRIBUTES = {word: ours for words, ours in _NETWORK_ATTRIBUTES.items() for word in words.split()}
_OWN_COMMANDS = "the commands `resnetlab detect train` and `resnetlab segment train`"
_ANNOTATED_ATTRIBUTES = {  # of other programs' detectors and segmenters: ours
    "net network module backbone": "model.net",
    "parameters named_parameters state_dict": "model.net, a torch.nn.Module",
    "to cpu cuda half": "load(path, device=…, precision=…)",
    "export": "the command `resnetlab export`",
    "explain gradcam plot": "predict(image).overlay",
    "train fit finetune": _OWN_COMMANDS,
    "val test validate score": "evaluate(data)",
    "forward": "predict(image), or model.net for tensors",
    "preprocessing transform transforms preprocess": "predict, which resizes and normalises images itself",
    "names class_names labels": "classes",
    "num_classes": "len(model.classes)",
    "serve": "the command `resnetlab serve`",
    "push_to_hub": "the command `resnetlab push`",
    "save_pretrained": "save(file)",
    "metrics": "evaluate(data), a dictionary",
}  # fmt: skip
ANNOTATED_ATTRIBUTES = {word: ours for words, ours in _ANNOTATED_ATTRIBUTES.items() for word in words.split()}
_SAVED = {
    **dict.fromkeys(("save", "savefig", "to_file"), "overlay.save(file)"),
    **dict.fromkeys(("show", "plot", "render", "image", "heatmap"), "overlay, a Pillow image"),
}
EXPLANATION_ATTRIBUTES = {  # of other programs' explanations: ours
    **_SAVED, "label": "top[0][0]", "score": "top[0][1]", "cam": "heat", "attributions": "heat",
    "figure": "the command `resnetlab explain`, which writes the figure of the blocks",
}  # fmt: skip
ANNOTATED_PREDICTION_ATTRIBUTES = {  # of other programs' boxes and masks: ours
    **_SAVED, "boxes": "result['boxes']", "path": "name", "top": "result['boxes'] of a detector, best first",
    **dict.fromkeys(
        ("labels", "label", "scores", "score", "conf", "xyxy"),
        "result['boxes'], where each box has its class, score and corners",
    ),
    **dict.fromkeys(("mask", "masks"), "model.segment(pixels) for the class of every pixel; overlay shows them"),
    "classes": "result['classes'] of a segmenter, or the boxes in result['boxes'] of a detector",
}  # fmt: skip
PREDICTION_ATTRIBUTES = {  # of other programs' results: ours
    "scores": "[each.score for each in prediction.top]", "probs": "[each.score for each in prediction.top]",
    "probabilities": "[each.score for each in prediction.top]", "conf": "score", "confidence": "score",
    "prob": "score", "probability": "score", "top1": "label", "top5": "top", "class_name": "label", "cls": "label",
    "names": "[each.label for each in prediction.top]", "classes": "[each.label for each in prediction.top]",
    "path": "name", "summary": "to_dict()", "argmax": "label", "save": "to_json(), to_dict() or to_pandas()",
    **dict.fromkeys(("show", "plot"), "model.explain(image).overlay, a Pillow image"),
    "tojson": "to_json()", "to_df": "to_pandas()", "dict": "to_dict()",
}  # fmt: skip
_DICTIONARIES = {
    "results_dict": "to_dict()",
    **dict.fromkeys(("to_pandas", "to_df"), "pandas.Series(result.to_dict())"),
}
_ACCURACIES = dict.fromkeys(("accuracy", "acc", "score"), "1 - result.top1_error")
EVALUATION_ATTRIBUTES = {  # of other programs' results of an evaluation: ours
    **_DICTIONARIES, **_ACCURACIES,
    "top1": "top1_error", "top5": "top5_error", "per_class": "metrics.per_class",
    **dict.fromkeys(("plot", "save"), "the command `resnetlab evaluate`, which writes a page"),
    "confusion_matrix": "metrics.confusion", "loss": "metrics.loss", "f1": "metrics.macro('f1')",
}  # fmt: skip
RESULT_ATTRIBUTES = {  # of a training run of any task
    **_DICTIONARIES,
    **dict.fromkeys(("history", "metrics", "log"), "pandas.read_json(result.run + '/metrics.jsonl', lines=True)"),
    "best_model": "model", "save_dir": "run", "path": "run", "predict": "resnetlab.load(result.model).predict(image)",
}  # fmt: skip
CLASSIFIER_ATTRIBUTES = {  # of a classifier's training run
    **RESULT_ATTRIBUTES, **_ACCURACIES,
    **{word: f"resnetlab.load(result.model).evaluate(data).{ours}" for word, ours in EVALUATION_ATTRIBUTES.items()
       if ours.startswith("metrics.")},
    "evaluate": "resnetlab.load(result.model).evaluate(data)", "net": "resnetlab.load(result.model).net",
}  # fmt: skip
_FORMATS = {  # of other programs' exports: what does the job
    "torchscript ts jit script pt":
        "torch has deprecated TorchScript: --to torch writes its successor, a torch.export program (FILE.pt2), and in Python "
        "torch.jit.trace(load(path).net.eval(), images) traces the network without its preprocessing.",
    "tensorrt trt engine": "TensorRT reads ONNX (--to onnx).",
    "coreml mlmodel mlpackage tflite litert saved_model pb tf keras tfjs ncnn paddle mnn":
        "converters of other programs read ONNX (--to onnx).",
    "state_dict pth weights timm": "--to torchvision writes the state_dict, which timm loads too.",
    "safetensors": "a model file is one already; with torchvision's names: --to torchvision --out FILE.safetensors.",
}  # fmt: skip
FORMAT_ANSWERS = {word: answer for words, answer in _FORMATS.items() for word in words.split()}
COMMANDS = {  # others' commands: ours
    "fit": "train", "finetune": "train DATA --start-from MODEL", "tune": "train", "resume": "train --resume RUN",
    "val": "evaluate", "eval": "evaluate", "validate": "evaluate", "test": "evaluate", "benchmark": "doctor",
    "infer": "predict", "inference": "predict", "classify": "predict", "run": "train", "gradcam": "explain", "cam": "explain",
    "info": "inspect", "summary": "inspect", "list": "models", "convert": "export", "download": "import", "upload": "push",
    "share": "push",
    "api": "serve", "env": "doctor", "demo": "serve",
    "version": "--version", "-V": "--version", "-v": "--version", "--list-models": "models",
    "help": "--help", "features": "embed", "check": "data check",
    "report": "runs compare RUN RUN", "compare": "runs compare RUN RUN", "history": "runs", "visualize": "explain",
}  # fmt: skip
PYTHON = {  # others' functions: ours
    "ResNet": "build(name)", "summary": "the command `resnetlab inspect`", "info": "the command `resnetlab inspect`",
    "version": "__version__", "ImageFolder": "train(data=folder)", "DataLoader": "train(data=…), which takes a data set",
    **dict.fromkeys(("available_models", "list_pretrained", "get_model_weights"), "list_models(pretrained=True)"),
    "create_model": "build(name)", "get_model": "build(name)", "make_model": "build(name)", "from_name": "build(name)",
    "load_model": "load(path)", "from_pretrained": "load(name)", "Model": "load(path)", "YOLO": "load(path)",
    "fit": "train(data=…)", "Trainer": "train(data=…)",
    "finetune": "train(data=…, recipe='finetune', start_from=path)", "predict": "load(path).predict(image)",
    "explain": "load(path).explain(image)", "embed": "load(path).embed(images)", "export": "load(path).export(file)",
    "save": "load(path).save(file)", "val": "evaluate(model, data)", "test": "evaluate(model, data)",
    "validate": "evaluate(model, data)", "detect": "the command `resnetlab detect`; load(path) opens a detector's model file",
    "segment": "the command `resnetlab segment`; load(path) opens a segmenter's model file",
    "study": "the command `resnetlab study`", "serve": "the command `resnetlab serve`",
    "resume": "train(resume=folder)", "datasets": "train(data=…), which takes names, folders and arrays",
    **dict.fromkeys(
        ("create_transform", "resolve_data_config", "resolve_model_data_config", "transforms"),
        "load(path).preprocessing, which makes the input of a model's network of an image",
    ),
    "create_feature_extractor": "net.features(images), the map of every stage",
    "freeze": "resnetlab.models.backbone.freeze(net, 'C3')",
}  # fmt: skip


_OURS: dict[str, list[str]] = {}
for _own, _theirs in _SYNONYMS.items():
    for _word in _theirs.split():
        _OURS.setdefault(_word, []).append(_own)


def translate(word: str, known: Collection[str]) -> str | None:
    """Our word, one of `known`, for a word of another program; None if there is none.

    >>> translate("batch_size", ["batch", "lr"]), translate("batch_size", ["net"])
    ('batch', None)
    """
    return next((own for own in _OURS.get(word, ()) if own in known), None)


def is_peer_word(word: str) -> bool:
    """Whether a word is an option of another program."""
    return word in _OURS or word in ANSWERS or word in _FLAGS


def translate_flag(word: str, known: Collection[str]) -> tuple[str, str] | None:
    """Our option, one of `known`, and its value for a flag of another program, such as "cpu"; None if there is none."""
    found = _FLAGS.get(word)
    return found if found is not None and found[0] in known else None
