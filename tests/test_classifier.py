"""Image classifiers of others: specs, what they read, and files that are refused before anything runs."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from engine.classifier import ImageClassifier
from engine.classifier_spec import spec_path
from engine.errors import ClassifierError
from tests.classifiers import linear, means, write_model, write_spec

PICTURES = np.random.default_rng(0).integers(0, 256, (21, 8, 8, 3), dtype=np.uint8)
MOOD = {"output": "y", "classes": ["a", "b", "c"]}
VALUE = {"output": "y", "columns": [0, 1], "kind": "value"}


def opened(path, attributes, **entries) -> ImageClassifier:
    return ImageClassifier(write_spec(path, attributes, **entries))


# --- what a model reads ----------------------------------------------------------------------------------------------


def channels(tmp_path, **entry) -> np.ndarray:
    """Mean of the three channels as the model sees them."""
    attributes = {f"c{i}": {"output": "y", "columns": [i, i + 1], "kind": "value"} for i in range(3)}
    return opened(means(tmp_path / "m.onnx"), attributes, input=entry).read(PICTURES)


def test_range_mean_and_deviation_are_applied_in_this_order(tmp_path):
    raw = PICTURES.mean(axis=(1, 2))
    np.testing.assert_allclose(channels(tmp_path), raw / 255, rtol=1e-5)
    np.testing.assert_allclose(channels(tmp_path, range=[-1, 1]), raw / 127.5 - 1, atol=1e-5)
    found = channels(tmp_path, range=[0, 255], mean=[100, 110, 120], std=256)
    np.testing.assert_allclose(found, (raw - [100, 110, 120]) / 256, atol=1e-5)


def test_colours_may_come_in_another_order(tmp_path):
    raw = PICTURES.mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(channels(tmp_path, colour="BGR"), raw[:, ::-1], rtol=1e-5)
    path = write_model(tmp_path / "g.onnx", [helper.make_node("GlobalAveragePool", ["x"], ["y"])],
                       {"y": ("n", 1, 1, 1)}, inputs={"x": ("n", 1, 8, 8)})
    grey = opened(path, {"light": VALUE}, input={"colour": "grey"}).read(PICTURES)
    np.testing.assert_allclose(grey[:, 0], raw @ [0.299, 0.587, 0.114], atol=1e-5)


def test_a_layout_with_colours_last(tmp_path):
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[1, 2], keepdims=0)]
    path = write_model(tmp_path / "l.onnx", nodes, {"y": ("n", 3)}, inputs={"x": ("n", 8, 8, 3)})
    found = opened(path, {"red": VALUE}, input={"layout": "NHWC"}).read(PICTURES)
    np.testing.assert_allclose(found[:, 0], PICTURES[..., 0].mean(axis=(1, 2)) / 255, rtol=1e-5)


def test_a_crop_is_a_part_of_the_picture_or_a_margin_around_it(tmp_path):
    half = channels(tmp_path, crop=[0.5, 0, 1, 1])  # 4 columns, stretched to 8
    np.testing.assert_allclose(half, PICTURES[:, :, 4:].mean(axis=(1, 2)) / 255, atol=0.02)
    wide = channels(tmp_path, crop=[-0.5, -0.5, 1.5, 1.5], fill=255)  # the picture is a quarter of the area
    np.testing.assert_allclose(wide, 0.75 + PICTURES.mean(axis=(1, 2)) / 255 / 4, atol=0.02)


def test_pictures_of_another_size_are_resized(tmp_path):
    attributes = {"red": VALUE}
    large = PICTURES.repeat(4, axis=1).repeat(4, axis=2)
    model = opened(means(tmp_path / "m.onnx"), attributes)
    np.testing.assert_allclose(model.read(large), model.read(PICTURES), atol=0.01)


@pytest.mark.parametrize("count", [1, 5, 16, 21])
def test_a_fixed_batch_and_any_number_of_pictures(tmp_path, count):
    free = opened(means(tmp_path / "a.onnx"), {"red": VALUE}).read(PICTURES[:count])
    fixed = opened(means(tmp_path / "b.onnx", inputs={"x": (4, 3, 8, 8)}), {"red": VALUE}).read(PICTURES[:count])
    np.testing.assert_array_equal(free, fixed)
    assert free.shape == (count, 1)


# --- what a model says -----------------------------------------------------------------------------------------------


def test_outputs_become_probabilities_and_values(tmp_path):
    weight, bias = np.random.default_rng(1).normal(size=(3, 6)) * 4, np.arange(6) - 2.0
    y = (PICTURES.mean(axis=(1, 2)) / 255) @ weight + bias
    model = opened(linear(tmp_path / "m.onnx", weight, bias), {
        "mood": {"output": "y", "columns": [0, 3], "classes": ["sad", "happy", "calm"]},
        "smile": {"output": "y", "columns": [0, 3], "classes": {"no": [0, 2], "yes": 1}},
        "glasses": {"output": "y", "columns": [3, 4], "activation": "sigmoid"},
        "age": {"output": "y", "columns": [4, 5], "kind": "value", "scale": 0.01, "offset": 0.2},
        "years": {"output": "y", "columns": [0, 3], "bins": [0.0, 0.5, 1.0], "activation": "softmax"},
    })
    e = np.exp(y[:, :3]) / np.exp(y[:, :3]).sum(axis=1, keepdims=True)
    glasses = 1 / (1 + np.exp(-y[:, 3]))
    expected = np.column_stack([e, e[:, [0, 2]].sum(axis=1), e[:, 1], 1 - glasses, glasses, 0.2 + 0.01 * y[:, 4],
                                e @ [0, 0.5, 1]])
    np.testing.assert_allclose(model.read(PICTURES), expected, atol=1e-5)
    labels = model.predict(PICTURES)
    np.testing.assert_array_equal(labels[:, 0], e.argmax(axis=1))
    np.testing.assert_array_equal(labels[:, 2], glasses > 0.5)
    assert [a.kind for a in model.attributes] == ["class", "class", "class", "value", "value"]


def test_several_outputs_of_one_model(tmp_path):
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["y"]),
             helper.make_node("ReduceMax", ["y"], ["top"], axes=[1])]
    path = write_model(tmp_path / "m.onnx", nodes, {"y": ("n", 3), "top": ("n", 1)})
    model = opened(path, {"red": VALUE, "top": {"output": "top", "kind": "value"}}, features="y")
    raw = PICTURES.mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(model.read(PICTURES), np.stack([raw[:, 0], raw.max(axis=1)], axis=1), rtol=1e-5)
    np.testing.assert_allclose(model.features(PICTURES), raw, rtol=1e-5)


def test_a_picture_alone_has_the_bits_that_it_has_anywhere(tmp_path):
    model = opened(linear(tmp_path / "m.onnx", np.eye(3), np.zeros(3)), {"mood": MOOD})
    whole = model.read(PICTURES, alone=True)
    for i in (0, 7, 20):
        np.testing.assert_array_equal(model.read(PICTURES[i : i + 1], alone=True)[0], whole[i])


def test_numbers_that_are_not_finite_are_an_error_that_names_the_spec(tmp_path):
    model = opened(linear(tmp_path / "m.onnx", np.full((3, 1), np.inf), np.zeros(1)), {"age": VALUE})
    with pytest.raises(ClassifierError, match=r"not finite.*m\.spec\.json"):
        model.read(PICTURES)


# --- the spec ---------------------------------------------------------------------------------------------------------


def test_a_missing_spec_is_written_as_a_template_and_named(tmp_path):
    path = linear(tmp_path / "mood.onnx", np.eye(3), np.zeros(3), size=16)
    with pytest.raises(ClassifierError, match=r"no spec mood\.spec\.json.*template was written to .*mood\.spec\.json"):
        ImageClassifier(path)
    document = json.loads(spec_path(path).read_text())
    assert document["input"]["size"] == [16, 16]
    assert document["input"]["layout"] == "NCHW"
    assert document["_file"]["outputs"] == {"y": 3}
    assert "input.mean" in document["_help"]
    with pytest.raises(ClassifierError, match='set "ready" to true'):
        ImageClassifier(path)
    document["ready"] = True
    spec_path(path).write_text(json.dumps(document))
    assert ImageClassifier(path).attributes[0].classes == ("class0", "class1", "class2")


@pytest.mark.parametrize(("change", "said"), [
    ({"input": {"size": [8]}}, r"expected \[height, width\]"),
    ({"input": {"size": [9, 9]}}, "the spec gives"),
    ({"input": {"layout": "CHW"}}, "expected one of NCHW, NHWC"),
    ({"input": {"std": 0}}, "contains 0"),
    ({"input": {"mean": [1, 2]}}, "expected 1 or 3 numbers"),
    ({"input": {"crop": [1, 0, 0, 1]}}, "left < right"),
    ({"input": {"name": "picture"}}, "the spec says 'picture'"),
    ({"input": {"colour": "grey"}}, "the spec gives"),
    ({"attributes": {}}, "name nothing"),
    ({"attributes": {"a b": VALUE}}, "letters, digits and _"),
    ({"attributes": {"age": {**VALUE, "output": "z"}}}, "there is no output 'z'; there are: y"),
    ({"attributes": {"age": {**VALUE, "columns": [1, 9]}}}, "are not among the 3"),
    ({"attributes": {"age": {**VALUE, "columns": [0, 2]}}}, "expected 1, or as many bins"),
    ({"attributes": {"mood": {"output": "y", "classes": ["a", "b"]}}}, "2 classes and 3 columns"),
    ({"attributes": {"mood": {"output": "y", "classes": ["a", "a", "b"]}}}, "two or more different names"),
    ({"attributes": {"smile": {"output": "y", "columns": [0, 1]}}}, "softmax is always 1"),
    ({"attributes": {"mood": {"output": "y", "classes": {"a": 0, "b": 7}}}}, "a column beyond 3"),
    ({"attributes": {"age": {**VALUE, "scael": 1}}}, "unknown entry 'scael'"),
    ({"attributes": {"age": {**VALUE, "scale": float("nan")}}}, "expected 1 numbers"),
    ({"features": "z"}, "no output 'z' for the features"),
    ({"version": 2}, "expected 1"),
])
def test_a_wrong_spec_is_one_sentence(tmp_path, change, said):
    path = write_spec(means(tmp_path / "m.onnx"), **{"attributes": {"age": VALUE}, **change})
    with pytest.raises(ClassifierError, match=said) as error:
        ImageClassifier(path)
    assert "m.spec.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "[" * 100_000, '{"format": 7}', '{"format": "lace-engine '
                                  'classifier", "version": 1, "input": 3, "attributes": {"a": [1]}}'])
def test_a_spec_that_is_none_is_refused(tmp_path, text):
    path = means(tmp_path / "m.onnx")
    spec_path(path).write_text(text)
    with pytest.raises(ClassifierError, match=r"m\.spec\.json"):
        ImageClassifier(path)


# --- files of strangers -----------------------------------------------------------------------------------------------


def constant(name, values, dtype=TensorProto.INT64):
    values = np.asarray(values)
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, dtype, values.shape, values))


def bomb(op, numbers):
    """A result of about 1e15 numbers."""
    return [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["y0"]),
            constant("s", numbers), helper.make_node(op, ["y0", "s"] if op != "ConstantOfShape" else ["s"], ["big"]),
            helper.make_node("ReduceMax", ["big"], ["m"]), helper.make_node("Add", ["y0", "m"], ["y"])]


def squared(times):
    """A size that is squared again and again."""
    nodes = [helper.make_node("Shape", ["x"], ["s0"])]
    nodes += [helper.make_node("Mul", [f"s{i}", f"s{i}"], [f"s{i + 1}"]) for i in range(times)]
    return [*nodes, helper.make_node("ConstantOfShape", [f"s{times}"], ["y"])]


def endless():
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["v"], ["u"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []),
         helper.make_tensor_value_info("c", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, []),
         helper.make_tensor_value_info("u", TensorProto.FLOAT, ["n", 3, 8, 8])])
    return [constant("go", True, TensorProto.BOOL), helper.make_node("Loop", ["", "go", "x"], ["y"], body=body)]


HOSTILE = {
    "an operator of another domain": ([helper.make_node("Run", ["x"], ["y"], domain="evil")], "evil.Run"),
    "a loop without end": (endless(), "uses the operator Loop"),
    "an unknown operator": ([helper.make_node("StringSplit", ["x"], ["y"])], "uses the operator StringSplit"),
    "repeated without end": (
        [helper.make_node("Identity", ["x"], ["x0"]), constant("t", [1, 1, 1000, 1000]),
         *(helper.make_node("Tile", [f"x{i}", "t"], [f"x{i + 1}"]) for i in range(3)),
         helper.make_node("GlobalAveragePool", ["x3"], ["y"])], "expected at most"),
    "expanded without end": (bomb("Expand", [2**25, 2**25, 3]), "expected at most"),
    "filled without end": (bomb("ConstantOfShape", [2**25, 2**25]), "expected at most"),
    "a negative size": (bomb("ConstantOfShape", [-5, 3]), "impossible shape"),
    "a size from a picture": (
        [helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
         helper.make_node("ConstantOfShape", ["i"], ["y"])], "not constant"),
    "a size that explodes": (squared(60), "not constant"),
    "a name that nothing gives": ([helper.make_node("Relu", ["z"], ["y"])], "nothing before it gives"),
}


@pytest.fixture
def nothing_runs(monkeypatch):
    import onnxruntime

    def refuse(*_, **__):
        raise AssertionError("ONNX Runtime was given the file")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_one_line_before_it_runs(tmp_path, nothing_runs, name):
    nodes, said = HOSTILE[name]
    path = write_spec(write_model(tmp_path / "m.onnx", nodes, {"y": ("n", 3)}, domains=("evil",)), {"age": VALUE})
    with pytest.raises(ClassifierError, match=said) as error:
        ImageClassifier(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("location", "said"), [
    ("../secret.bin", "the name of a file beside it"), ("/etc/passwd", "the name of a file beside it"),
    ("link.bin", "which is no file beside it"), ("missing.bin", "which is no file beside it"),
    ("short.bin", "end at byte"),
])
def test_numbers_elsewhere_are_refused(tmp_path, nothing_runs, location, said):
    (tmp_path / "secret.bin").write_bytes(bytes(100))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "short.bin").write_bytes(bytes(4))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = with_numbers_beside(folder / "m.onnx", location)
    with pytest.raises(ClassifierError, match=said):
        ImageClassifier(write_spec(path, {"age": VALUE}))


def with_numbers_beside(path, location):
    model = onnx.load(linear(path, np.eye(3), np.zeros(3)))
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "36")):
        weight.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


def test_numbers_in_a_file_beside_it_are_read(tmp_path):
    path = with_numbers_beside(tmp_path / "m.onnx", "m.onnx.data")
    (tmp_path / "m.onnx.data").write_bytes(np.eye(3, dtype=np.float32).tobytes())
    found = opened(path, {"red": VALUE}).read(PICTURES)
    np.testing.assert_allclose(found[:, 0], PICTURES[..., 0].mean(axis=(1, 2)) / 255, rtol=1e-5)


def test_no_change_of_a_file_ends_otherwise_than_with_one_error(tmp_path):
    """A few hundred files with changed bytes: refused, or opened and run, but never another error."""
    path = write_spec(linear(tmp_path / "m.onnx", np.eye(3), np.zeros(3)), {"mood": MOOD})
    whole, rng, fates = path.read_bytes(), np.random.default_rng(0), []
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            data[place] = rng.integers(256)
        path.write_bytes(bytes(data[: rng.integers(len(data))] if rng.random() < 0.2 else data))
        try:
            ImageClassifier(path)
            fates.append("opened")
        except ClassifierError as error:
            fates.append(str(error))
    assert "opened" in fates
    assert len(set(fates)) > 10
    assert not any("\n" in fate for fate in fates)


class Others(torch.nn.Module):
    """What exporters of torch make of views, attention and pooling."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.BatchNorm2d(8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.classes, self.age = torch.nn.Linear(8 * 16, 5), torch.nn.Linear(8, 1)

    def forward(self, x):
        x = torch.nn.functional.max_pool2d(torch.nn.functional.hardswish(self.norm(self.conv(x))), 1)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        return self.classes(x.reshape(x.shape[0], -1)), torch.sigmoid(self.age(tokens.mean(1)))


@pytest.mark.filterwarnings("ignore")  # of torch about its own exporters
@pytest.mark.parametrize("is_new", [True, False])
def test_what_torch_exports_is_read_and_gives_its_answers(tmp_path, is_new):
    path, net = tmp_path / "m.onnx", Others().eval()
    x = torch.randn(2, 3, 8, 8)
    names = {"input_names": ["x"], "output_names": ["y", "a"]}
    if is_new:
        shapes = ({0: torch.export.Dim("rows")},)
        torch.onnx.export(net, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    else:
        torch.onnx.export(net, (x,), path, dynamo=False, dynamic_axes={"x": {0: "rows"}}, **names)
    model = opened(path, {"mood": {"output": "y", "classes": list("abcde")},
                          "age": {"output": "a", "kind": "value"}}, input={"range": [-1, 1]})
    with torch.no_grad():
        classes, age = net(torch.from_numpy(PICTURES).permute(0, 3, 1, 2).float() / 127.5 - 1)
    found = model.read(PICTURES)
    np.testing.assert_allclose(found[:, :5], classes.softmax(dim=1).numpy(), atol=1e-5)
    np.testing.assert_allclose(found[:, 5:], age.numpy(), atol=1e-5)
