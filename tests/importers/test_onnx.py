"""Reading ONNX: operator sets, shapes, constants, external data, functions, and every kind of bad input."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from nestc.errors import Error, ModelError, ShapeError, UnsupportedOp
from nestc.graph import pipeline, regions
from nestc.graph.model import Model, parse_dim, parse_shape, require_static, unbound_dims
from nestc.importers.onnx import load
from nestc.importers.upgrade import CANONICAL_OPSET

SIMPLE = Path(onnx.__file__).parent / "backend/test/data"


def parse(text: str, opset: int = 21, **weights: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["":{opset}]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def run(model: Model | onnx.ModelProto, *inputs: np.ndarray) -> list[np.ndarray]:
    proto = ir.to_proto(model.ir) if isinstance(model, Model) else model
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return [np.asarray(each) for each in session.run(None, dict(zip(names, inputs, strict=True)))]


def refused(kind: type[Error], part: str, source: object, **options: object) -> None:
    """Loading fails with one sentence of that kind that contains `part`."""
    with pytest.raises(kind) as caught:
        load(source, **options)  # pyright: ignore[reportArgumentType]
    message = str(caught.value)
    assert part in message
    assert "\n" not in message


RELU = "g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }"


def test_sources_are_paths_bytes_and_protos(tmp_path: Path) -> None:
    proto = parse(RELU)
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    models = [load(proto), load(proto.SerializeToString()), load(path), load(str(path))]
    assert {model.hash for model in models} == {models[0].hash}
    assert models[0].inputs == {"x": ("float32", ("N", 3))}
    assert models[0].outputs == {"y": ("float32", ("N", 3))}
    assert models[0].ir.opset_imports == {"": CANONICAL_OPSET}


def test_hash_depends_on_weights() -> None:
    text = "g (float[3] x) => (float[3] y) { y = Add(x, w) }"
    first, second = (load(parse(text, w=np.full(3, value, np.float32))) for value in (1, 2))
    assert first.hash != second.hash
    large = "g (float[999] x) => (float[999] y) { y = Add(x, w) }"
    first, second = (load(parse(large, w=np.full(999, value, np.float32))) for value in (1, 2))
    assert first.hash != second.hash


# What each change of an operator set between 7 and the canonical one did to a model: attributes became inputs,
# defaults changed, operators were renamed.
OLD = {
    "Upsample 7": (7, 'Upsample<mode="nearest", scales=[1.0, 1.0, 2.0, 2.0]>(x)', (1, 2, 3, 3)),
    "Upsample 9": (9, 'Upsample<mode="linear">(x, s)', (1, 2, 3, 3)),
    "Resize 10": (10, 'Resize<mode="linear">(x, s)', (1, 2, 3, 3)),
    "Slice 7": (7, "Slice<axes=[1, 2], ends=[2, -1], starts=[0, 0]>(x)", (1, 2, 3, 3)),
    "Pad 7": (7, "Pad<pads=[0, 0, 1, 1, 0, 0, 1, 1], value=2.0>(x)", (1, 2, 3, 3)),
    "Clip 7": (7, "Clip<min=-0.5, max=0.5>(x)", (1, 2, 3, 3)),
    "Dropout 7": (7, "Dropout<ratio=0.5>(x)", (1, 2, 3, 3)),
    "BatchNormalization 7": (7, "BatchNormalization<epsilon=0.1>(x, p, p, p, p)", (1, 2, 3, 3)),
    "Softmax 8": (8, "Softmax(x)", (2, 3, 4)),
    "LogSoftmax 11": (11, "LogSoftmax<axis=0>(x)", (2, 3, 4)),
    "Squeeze 11": (11, "Squeeze<axes=[0]>(x)", (1, 2, 3, 3)),
    "Unsqueeze 8": (8, "Unsqueeze<axes=[0, 2]>(x)", (2, 3)),
    "ReduceSum 7": (7, "ReduceSum<axes=[1], keepdims=0>(x)", (2, 3)),
    "ReduceMax 12": (12, "ReduceMax<axes=[-1]>(x)", (2, 3)),
    "ReduceMean 17": (17, "ReduceMean<axes=[0]>(x)", (2, 3)),
    "MaxPool 8": (8, "MaxPool<kernel_shape=[2, 2], strides=[1, 1]>(x)", (1, 2, 3, 3)),
    "AveragePool 7": (7, "AveragePool<kernel_shape=[2, 2], pads=[1, 1, 1, 1]>(x)", (1, 2, 3, 3)),
    "Gather 8": (8, "Gather<axis=1>(x, i)", (1, 2, 3, 3)),
    "Flatten 9": (9, "Flatten<axis=2>(x)", (1, 2, 3, 3)),
    "ArgMax 11": (11, "ArgMax<axis=1>(x)", (2, 3)),
    "Hardmax 11": (11, "Hardmax(x)", (2, 3)),
}


@pytest.mark.parametrize("name", OLD)
def test_old_operator_sets(name: str) -> None:
    opset, call, shape = OLD[name]
    kind = "int64" if "ArgMax" in call else "float"
    dims = ",".join(map(str, shape))
    weights = {
        "s": np.array([1, 1, 2, 2], np.float32),
        "p": np.array([1.5, 0.5], np.float32),
        "i": np.array([1, 0], np.int64),
    }
    used = {key: value for key, value in weights.items() if f" {key})" in call or f" {key}," in call}
    proto = parse(f"g (float[{dims}] x) => ({kind} y) {{ y = {call} }}", opset, **used)
    model = load(proto)
    assert model.ir.opset_imports[""] == CANONICAL_OPSET
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected, found = run(proto, x), run(model, x)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert model.outputs["y"][1] == expected[0].shape


def test_split_without_sizes_and_topk_of_old_sets() -> None:
    proto = parse("g (float[4,4] x) => (float[2,4] a, float[2,4] b) { a, b = Split<axis=0>(x) }", 11)
    x = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    for expected, found in zip(run(proto, x), run(load(proto), x), strict=True):
        np.testing.assert_array_equal(expected, found)
    proto = parse("g (float[4,4] x) => (float[4,2] a, int64[4,2] b) { a, b = TopK<axis=1, k=2>(x) }", 7)
    for expected, found in zip(run(proto, x), run(load(proto), x), strict=True):
        np.testing.assert_array_equal(expected, found)


@pytest.mark.parametrize("name", ["test_Conv2d_depthwise", "test_BatchNorm2d_eval", "test_AvgPool1d"])
def test_even_older_files(name: str) -> None:
    folder = SIMPLE / "pytorch-converted" / name
    x, y = (
        numpy_helper.to_array(onnx.load_tensor(folder / f"test_data_set_0/{part}_0.pb")) for part in ("input", "output")
    )
    np.testing.assert_allclose(run(load(folder / "model.onnx"), x)[0], y, rtol=1e-4, atol=1e-5)


def test_old_operators_inside_branches_and_after_others() -> None:
    text = """g (bool c, float[1,2,3] x) => (float[2,3] y) {
        a = Neg(x)
        b = If (c) <
            then_branch = p () => (float[2,3] u) { u = Squeeze<axes=[0]>(a) },
            else_branch = q () => (float[2,3] v) { v = ReduceSum<axes=[0], keepdims=0>(a) }>
        y = Softmax<axis=0>(b) }"""
    proto = parse(text, 11)
    x = np.random.default_rng(0).standard_normal((1, 2, 3)).astype(np.float32)
    for condition in (np.array(True), np.array(False)):
        expected, found = run(proto, condition, x), run(load(proto), condition, x)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)


def test_group_normalization_of_set_18_has_a_scale_a_group() -> None:
    weights = {"s": np.array([1, 2], np.float32), "b": np.array([3, 4], np.float32)}
    proto = parse(
        "g (float[1,4,3] x) => (float[1,4,3] y) { a = Neg(x)  y = GroupNormalization<num_groups=2>(a, s, b) }",
        18,
        **weights,
    )
    x = np.random.default_rng(0).standard_normal((1, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(run(load(proto), x)[0], run(proto, x)[0], rtol=1e-5, atol=1e-6)


def test_newer_sets_become_the_canonical_one_unless_they_use_what_is_new() -> None:
    newest = onnx.defs.onnx_opset_version()
    assert load(parse(RELU, newest)).ir.opset_imports[""] == CANONICAL_OPSET
    kept = load(parse("g (float[3] x) => (int32[3] y) { y = BitCast<to=6>(x) }", 26))
    assert kept.ir.opset_imports[""] == 26
    kept = load(parse("g (float[3] x, float[3] z) => (float[3] y) { y = Mod(x, z) }", 28))
    assert kept.ir.opset_imports[""] == 28


def test_shapes_and_dims() -> None:
    proto = parse("g (float[N,C,8] x, float[N] z) => (float[N,C,8] y) { y = Relu(x) }")
    model = load(proto)
    assert unbound_dims(model) == [("x", 0, "N"), ("x", 1, "C"), ("z", 0, "N")]
    bound = load(proto, dims={"N": 2, "C": 3})
    assert bound.inputs == {"x": ("float32", (2, 3, 8)), "z": ("float32", (2,))}
    assert bound.outputs["y"] == ("float32", (2, 3, 8))
    require_static(bound)
    by_shape = load(proto, shapes={"x": [2, 3, 8]})
    assert by_shape.inputs == bound.inputs  # N is bound for z too
    other = load(proto, shapes={"x": [2, 3, 5]})
    assert other.outputs["y"][1] == (2, 3, 5)
    fixed = load(parse("g (float[1,3] x) => (float[1,3] y) { a = Add(x, x)  y = Relu(a) }"), shapes={"x": [4, 3]})
    assert fixed.outputs["y"][1] == (4, 3)


def test_a_shape_operand_given_as_a_constant() -> None:
    proto = parse("g (float[2,6] x, int64[3] s) => (float[a,b,c] y) { y = Reshape(x, s) }")
    assert load(proto).outputs["y"][1] == ("a", "b", "c")
    model = load(proto, values={"s": np.array([3, 2, -1])})
    assert list(model.inputs) == ["x"]
    assert model.outputs["y"][1] == (3, 2, 2)
    refused(ShapeError, "dtype int64, but the value given has float32", proto, values={"s": np.zeros(3, np.float32)})


def test_local_functions_are_inlined() -> None:
    text = """<ir_version: 10, opset_import: ["":21, "mine":1]>
        g (float[3] x) => (float[3] y) { y = mine.twice<factor=3.0>(x) }
        <domain: "mine", opset_import: ["":21]> twice <factor> (a) => (b) {
            f = Constant<value_float: float = @factor>()  c = Mul(a, f)  b = Add(c, a) }"""
    model = load(onnx.parser.parse_model(text))
    assert not model.ir.functions
    assert {node.op_type for node in model.ir.graph} == {"Constant", "Mul", "Add"}
    np.testing.assert_array_equal(run(model, np.array([1, 2, 3], np.float32))[0], [4, 8, 12])


def test_nodes_have_names_of_their_own() -> None:
    proto = parse("g (float[3] x) => (float[3] y) { [same] a = Neg(x)  [same] b = Abs(a)  y = Exp(b) }")
    names = [node.name for node in load(proto).ir.graph]
    assert names[0] == "same"
    assert len(set(names)) == 3
    assert all(names)


def test_unsorted_nodes_are_sorted() -> None:
    proto = parse("g (float[3] x) => (float[3] y) { a = Neg(x)  y = Abs(a) }")
    proto.graph.node.reverse()
    assert [node.op_type for node in load(proto).ir.graph] == ["Neg", "Abs"]


def external(folder: Path, weight: np.ndarray) -> Path:
    """A model that adds `weight`, which lies in ``weights.bin`` beside it."""
    proto = parse(f"g (float[{weight.size}] x) => (float[{weight.size}] y) {{ y = Add(x, w) }}", w=weight)
    path = folder / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_data_is_mapped(tmp_path: Path) -> None:
    weight = np.arange(1000, dtype=np.float32)
    model = load(external(tmp_path, weight))
    tensor = model.ir.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), weight)
    assert not tensor.numpy().flags.owndata
    model.save(tmp_path / "copy.onnx")
    (tmp_path / "weights.bin").unlink()
    np.testing.assert_array_equal(run(load(tmp_path / "copy.onnx"), -weight)[0], np.zeros(1000, np.float32))


def test_weights_inside_the_file_are_mapped_too(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32)
    proto = parse("g (float[2,40] x) => (float[2,50] y) { y = MatMul(x, w) }", w=weight)
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    model = load(path)
    tensor = model.ir.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), weight)
    assert not tensor.numpy().flags.owndata
    assert model.hash == load(proto).hash
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.onnx"]
    x = np.ones((2, 40), np.float32)
    np.testing.assert_allclose(run(model, x)[0], x @ weight, rtol=1e-5)


def test_more_weights_than_a_process_may_open_files(tmp_path: Path) -> None:
    nodes, weights, value = [], [], "x"
    for index in range(1100):
        weights.append(numpy_helper.from_array(np.full(300, 1, np.float32), f"w{index}"))
        nodes.append(helper.make_node("Add", [value, f"w{index}"], [value := f"v{index}"]))
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [300]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    arrays = [each.const_value.numpy() for each in model.ir.graph.initializers.values() if each.const_value is not None]
    assert len(arrays) == 1100
    assert len(os.listdir("/proc/self/fd")) < 500


def test_weights_of_more_than_two_gigabytes_are_not_read(tmp_path: Path) -> None:
    rows, width = 700_000, 1000
    proto = parse(f"g (int64[2] i) => (float[2,{width}] y) {{ y = Gather(w, i) }}")
    table = proto.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[rows, width])
    table.data_location = TensorProto.EXTERNAL
    table.external_data.add(key="location", value="table.bin")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with (tmp_path / "table.bin").open("wb") as file:
        file.truncate(4 * rows * width)  # a sparse file: it takes no room on the disk
        file.seek(4 * width * (rows - 1))
        file.write(np.arange(width, dtype=np.float32).tobytes())
    formed = regions.form(pipeline.optimize(load(tmp_path / "m.onnx")))
    (region,) = regions.regions(formed)
    values = region.constant("w")
    assert values is not None
    assert values.nbytes > 2**31
    np.testing.assert_array_equal(values[-1], np.arange(width, dtype=np.float32))


def test_large_weights_are_saved_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestc.graph.model.EXTERNAL_ABOVE", 1000)
    weight = np.arange(1000, dtype=np.float32)
    model = load(parse("g (float[1000] x) => (float[1000] y) { y = Add(x, w) }", w=weight))
    model.save(tmp_path / "m.onnx")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    again = load(tmp_path / "m.onnx")
    assert again.hash == model.hash
    again.save(tmp_path / "m.onnx")  # onto the file that its own weights are mapped from
    assert load(tmp_path / "m.onnx").hash == model.hash


def test_saving_is_all_or_nothing(tmp_path: Path) -> None:
    model = load(parse(RELU))
    model.save(tmp_path / "m.onnx")
    assert load(tmp_path / "m.onnx").hash == model.hash
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]
    with pytest.raises(Error, match="cannot write the model to"):
        model.save(tmp_path / "nowhere" / "m.onnx")


def test_not_a_model(tmp_path: Path) -> None:
    refused(ModelError, "cannot read the model", tmp_path / "missing.onnx")
    refused(ModelError, "Is a directory", tmp_path)
    for name, content, part in (
        ("empty", b"", "is empty"),
        ("text", b"this is no model, but some text of fair length" * 9, "is not an ONNX model"),
        ("nothing", b"\x08\x0a", "no graph in it"),
        ("cut", parse(RELU).SerializeToString()[:-9], "is not an ONNX model, or is cut"),
        ("bundle", b"PK\x03\x04" + bytes(60), "if it is a bundle, run it"),
    ):
        refused(ModelError, part, content)
        (tmp_path / name).write_bytes(content)
        refused(ModelError, part, tmp_path / name)


def test_a_large_model_that_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(parse("g (float[2,40] x) => (float[2,50] y) { y = MatMul(x, w) }", w=np.ones((40, 50), np.float32)), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(ModelError, "is not an ONNX model, or is cut", path)


def test_unsound_graphs() -> None:
    refused(
        ModelError,
        "node Add 'y' of graph 'g' uses the value 'z', which no node, input or weight defines",
        parse("g (float[3] x) => (float[3] y) { y = Add(x, z) }"),
    )
    refused(
        ModelError,
        "graph 'g' has a cycle through node Add 'a'",
        parse("g (float[3] x) => (float[3] y) { a = Add(x, b)  b = Neg(a)  y = Abs(b) }"),
    )
    refused(
        ModelError,
        "output 'y' of graph 'g' is not computed by any node",
        parse("g (float[3] x) => (float[3] y) { a = Neg(x) }"),
    )
    refused(
        ModelError,
        "value 'y' is written by two nodes",
        parse("g (float[3] x) => (float[3] y) { y = Neg(x)  y = Abs(x) }"),
    )
    refused(
        ModelError,
        "uses the value 'z'",
        parse("""g (bool c, float[3] x) => (float[3] y) {
            y = If (c) <then_branch = a () => (float[3] p) { p = Neg(z) }, else_branch = b () => (float[3] q) { q = Abs(x) }> }"""),
    )


def test_what_breaks_the_standard() -> None:
    refused(ModelError, "has input size 1 not in range", parse("g (float[1,3] x) => (float[1,3] y) { y = Conv(x) }"))
    refused(ModelError, "Unrecognized attribute", parse("g (float[3] x) => (float[3] y) { y = Relu<a=1>(x) }"))
    refused(
        ModelError,
        "do not fit together: Add 'Add_0': B has inconsistent type",
        parse("g (float[3] x, int64[3] z) => (float[3] y) { y = Add(x, z) }"),
    )
    refused(
        ShapeError,
        "do not fit together: MatMul",
        parse("g (float[2,3] x, float[4,5] z) => (float[2,5] y) { y = MatMul(x, z) }"),
    )
    proto = parse("g (float[3] x) => (float[3] y) { y = Add(x, w) }", w=np.ones(3, np.float32))
    proto.graph.initializer[0].dims[0] = 4
    refused(ModelError, "weight 'w' of shape [4] needs 16 bytes, not 12", proto)
    proto = parse(RELU)
    del proto.opset_import[:]
    refused(ModelError, "does not say which ONNX operator set", proto)


def test_unknown_operators() -> None:
    refused(UnsupportedOp, "operator 'Foo', which ONNX operator set 21", parse(RELU.replace("Relu", "Foo")))
    refused(UnsupportedOp, "'Gelu', which ONNX operator set 17 does not have", parse(RELU.replace("Relu", "Gelu"), 17))
    text = (
        '<ir_version: 10, opset_import: ["":21, "com.acme":1]> g (float[3] x) => (float[3] y) { y = com.acme.Foo(x) }'
    )
    refused(UnsupportedOp, "com.acme::Foo, of a domain that is not part of ONNX", onnx.parser.parse_model(text))
    refused(ModelError, "operator set 99; supported are", parse(RELU, 99))
    prelu = SIMPLE / "pytorch-converted/test_PReLU_1d_multiparam/model.onnx"
    refused(ModelError, "PRelu as of operator set 6, which is not supported", prelu)


def test_wrong_shapes_and_names() -> None:
    refused(ShapeError, "no input 'z'; its inputs are 'x'", parse(RELU), shapes={"z": [1]})
    refused(ShapeError, "input 'x' has rank 2, ['N', 3]; the shape [1] does not fit", parse(RELU), shapes={"x": [1]})
    refused(ShapeError, "no symbolic dimension 'M'; they have 'N'", parse(RELU), dims={"M": 1})
    twice = parse("g (float[N] x, float[N] z) => (float[N] y) { y = Relu(x) }")
    refused(ShapeError, "dimension 'N' would be both 1 and 2", twice, shapes={"x": [1], "z": [2]})
    with pytest.raises(
        ShapeError, match="input 'x' has the symbolic dimension 'N' at axis 0; bind it with --dim N=SIZE"
    ):
        require_static(load(parse(RELU)))
    with pytest.raises(ShapeError, match="bind it with --shape x=3,SIZE"):
        require_static(load(parse("g (float[3,?] x) => (float[3,?] y) { y = Relu(x) }")))


def test_external_data_must_be_whole_and_inside(tmp_path: Path) -> None:
    weight = np.arange(1000, dtype=np.float32)
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(folder, weight)
    data = folder / "weights.bin"
    refused(ModelError, "give the model as a path", path.read_bytes())

    content = data.read_bytes()
    data.write_bytes(content[:3999])
    refused(ModelError, "needs bytes up to 4000 of 'weights.bin', which has only 3999", path)
    data.unlink()
    refused(ModelError, "'weights.bin', which is not in the model's folder", path)

    outside = tmp_path / "outside.bin"
    outside.write_bytes(content)
    data.symlink_to(outside)
    refused(ModelError, "outside the model's folder", path)
    data.unlink()
    os.link(outside, data)
    refused(ModelError, "which is a hard link", path)

    proto = onnx.load(path, load_external_data=False)
    for location in ("../outside.bin", str(outside)):
        entry = next(item for item in proto.graph.initializer[0].external_data if item.key == "location")
        entry.value = location
        path.write_bytes(proto.SerializeToString())
        refused(ModelError, "outside the model's folder", path)


def test_command_line_forms() -> None:
    assert parse_dim("batch=4") == ("batch", 4)
    assert parse_shape("a=b=1,3,224,224") == ("a=b", [1, 3, 224, 224])
    assert parse_shape("x=") == ("x", [])
    for text in ("batch", "batch=", "=3", "batch=x", "batch=0"):
        with pytest.raises(ShapeError, match="is not of the form NAME=SIZE"):
            parse_dim(text)
    for text in ("x", "x=1,a", "x=1,,2", "=1"):
        with pytest.raises(ShapeError, match="is not of the form NAME=D0,D1"):
            parse_shape(text)
