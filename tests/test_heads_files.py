"""Head files: LACE's checkpoints, and the safetensors of our own trainer."""

import json
import os

import numpy as np
import pytest
import safetensors.numpy
import torch

from engine.errors import CheckpointError
from exporter.heads import HeadAttribute, HeadStack, load_heads, save_head
from tests import checkpoints as build


@pytest.fixture
def write(tmp_path):
    def writer(names="smile", logits=2, *, legacy=False, edit=None, folder=".", **options):
        content, layers = build.lace_head(logits=logits, **options)
        if edit:
            edit(content)
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / f"best_valid_ckpt_{names}.pt"
        path.write_bytes(build.torch_bytes(content, legacy=legacy))
        return path, layers

    return writer


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("only", ["state_dict", "model_state_dict", None])
def test_a_head_of_lace_is_a_dense_stack(write, legacy, only):
    def edit(content):
        for key in [key for key in content if only not in (None, key)]:
            del content[key]

    path, layers = write(legacy=legacy, edit=edit)
    stack = load_heads(path)
    assert (stack.name, stack.space, len(stack.layers)) == ("smile", "w", 4)
    for (weight, bias), (w, b) in zip(stack.layers, layers, strict=True):
        assert np.array_equal(weight, w)
        assert np.array_equal(bias, b)
    (smile,) = stack.attributes
    assert (smile.kind, smile.classes, smile.columns, smile.layers) == ("class", ("no", "yes"), (0, 2), (4, 5))
    assert smile.provenance["file"] == path.name


@pytest.mark.parametrize(
    ("name", "logits", "classes", "layers"),
    [
        ("gender", 2, ("female", "male"), tuple(range(8))),
        ("glasses", 2, ("no", "yes"), tuple(range(6))),
        ("haircolor", 5, tuple("01234"), None),
        ("age", 1, (), (4, 5, 6, 7)),
        ("light0", 1, (), (7, 8, 9, 10, 11)),
        ("width", 1, (), None),
        ("age", 2, ("0", "1"), None),
        ("moods", 5, tuple("01234"), None),
        ("novelty", 3, ("0", "1", "2"), None),
    ],
)
def test_what_the_attributes_of_lace_mean(write, name, logits, classes, layers):
    (attribute,) = load_heads(write(name, logits)[0]).attributes
    assert (attribute.name, attribute.classes, attribute.layers) == (name, classes, layers)
    assert attribute.kind == ("class" if classes else "value")


def test_a_file_with_several_attributes_is_split_by_the_data_set(write):
    stack = load_heads(write("glasses-age-haircolor", 8)[0])
    assert [(a.name, a.columns) for a in stack.attributes] == [
        ("glasses", (0, 2)),
        ("age", (2, 3)),
        ("haircolor", (3, 8)),
    ]
    cats = load_heads(write("breeds-age", 18)[0])
    assert [(a.name, a.kind, a.columns) for a in cats.attributes] == [
        ("breeds", "class", (0, 16)),
        ("age", "class", (16, 18)),
    ]


def test_one_unknown_attribute_takes_the_logits_that_are_left(write):
    stack = load_heads(write("hat-fur", 5)[0], labels={"hat": ["none", "cap"]})
    assert [(a.name, a.classes) for a in stack.attributes] == [("hat", ("none", "cap")), ("fur", ("0", "1", "2"))]


def test_logits_that_cannot_be_shared_out_ask_for_a_labels_file(write, tmp_path):
    path, _ = write("hat-fur", 4)
    with pytest.raises(CheckpointError, match="--labels"):
        load_heads(path)
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"hat": ["none", "cap", "crown"], "other": "value", "fur": {
        "kind": "value", "range": [-1, 1], "sigma": 0.2, "layers": [3, 4]}}))
    hat, fur = load_heads(path, labels=labels).attributes
    assert hat.classes == ("none", "cap", "crown")
    assert (fur.kind, fur.range, fur.sigma, fur.layers, fur.columns) == ("value", (-1.0, 1.0), 0.2, (3, 4), (3, 4))


def test_labels_win_over_the_table(write):
    (smile,) = load_heads(write()[0], labels={"smile": {"classes": ["sad", "happy"], "layers": None}}).attributes
    assert (smile.classes, smile.layers) == (("sad", "happy"), None)


def test_cifar_heads_have_ten_named_classes_and_may_be_on_z(write):
    path, _ = write("label", 10, last="linear", folder="dense_embedder_z")
    stack = load_heads(path)
    assert stack.attributes[0].classes[3] == "cat"
    assert stack.space == "z"
    assert load_heads(path, space="w").space == "w"


def add(key, value):
    def edit(content):
        del content["model_state_dict"]
        content["state_dict"][key] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (add("net.1.running_mean", torch.zeros(5)), "normalisation"),
        (add("net.1.weight", torch.zeros(5)), "normalisation"),
        (add("net.3.weight", torch.zeros(4, 7, 1, 1)), "do not fit"),
        (add("net.0.weight", torch.zeros(5, 6, 3, 3)), "1x1"),
        (add("net.0.bias", torch.full((5,), float("nan"))), "NaN"),
        (add("backbone.fc.weight", torch.zeros(2)), "image classifier"),
        (add("net.0.bias", 3), "named tensors"),
        (lambda content: content.clear(), "state_dict"),
        (lambda content: content.update(state_dict={"a": torch.zeros(1)}), "expected those of a head"),
    ],
)
def test_heads_that_do_not_fit_are_refused_with_a_reason(write, edit, message):
    with pytest.raises(CheckpointError, match=message):
        load_heads(write(edit=edit)[0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"smile": ["no", "maybe", "yes"]}, "logits"),
        ({"smile": "text"}, "must be"),
        ({"smile": {"wrong": 1}}, "some of"),
        ({"smile": ["a", "a"]}, "repeat"),
        ({"smile": {"range": [1]}}, "range"),
        ({"smile": {"kind": "value"}}, "--labels"),
        ([1], "labels"),
    ],
)
def test_wrong_labels_are_refused(write, labels, message):
    with pytest.raises(CheckpointError, match=message):
        load_heads(write()[0], labels=labels)


def test_a_name_that_is_no_identifier_asks_for_another(write):
    with pytest.raises(CheckpointError, match="rename"):
        load_heads(write("2 smiles", 2)[0])


def test_a_generator_is_not_a_head(tmp_path):
    path = tmp_path / "best_valid_ckpt_smile.pt"
    path.write_bytes(build.rosinality_file(build.generator()))
    with pytest.raises(CheckpointError, match="state_dict"):
        load_heads(path)


def stack():
    rng = np.random.default_rng(0)
    layers = tuple((rng.normal(size=s).astype(np.float32), np.zeros(s[0], np.float32)) for s in ((4, 6), (3, 4)))
    attributes = (
        HeadAttribute("glasses", "class", ("no", "yes"), (0, 2), layers=(0, 1), provenance={"accuracy": 0.9}),
        HeadAttribute("age", "value", (), (2, 3), sigma=0.2, range=(-1.0, 1.0)),
    )
    return HeadStack("faces", "w", layers, attributes)


def test_a_saved_head_comes_back_as_it_was(tmp_path):
    path = tmp_path / "faces.safetensors"
    save_head(path, stack())
    found = load_heads(path)
    assert (found.name, found.space, found.attributes) == ("faces", "w", stack().attributes)
    for (a, b), (c, d) in zip(found.layers, stack().layers, strict=True):
        assert np.array_equal(a, c)
        assert np.array_equal(b, d)
    assert os.listdir(tmp_path) == ["faces.safetensors"]
    save_head(path, found)
    (glasses, age) = load_heads(path, labels={"glasses": ["off", "on"]}).attributes
    assert (glasses.classes, age.sigma) == (("off", "on"), 0.2)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "lace_head"),
        ({"lace_head": "no json"}, "damaged"),
        ({"lace_head": "{}"}, "damaged"),
        ({"lace_head": json.dumps({"name": "a", "space": "q", "attributes": []})}, "space"),
        ({"lace_head": json.dumps({"name": "a", "space": "w", "attributes": []})}, "no attributes"),
    ],
)
def test_a_damaged_file_of_our_own_is_refused(tmp_path, metadata, message):
    path = tmp_path / "a.safetensors"
    tensors = {"0.weight": np.zeros((2, 3), np.float32), "0.bias": np.zeros(2, np.float32)}
    path.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))
    with pytest.raises(CheckpointError, match=message):
        load_heads(path)


def test_a_truncated_file_of_our_own_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_head(path, stack())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError):
        load_heads(path)
