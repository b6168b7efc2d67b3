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
        ("age", 2, ("kitten", "old"), None),
        ("moods", 5, ("grumpy", "playful", "bored", "fearful", "happy"), None),
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


@pytest.mark.parametrize("name", ["best_valid_ckpt", "last_ckpt", "ckpt_10"])
def test_A7_heads_of_cifar_name_nothing_and_are_the_category(tmp_path, name):
    content, _ = build.lace_head(logits=10, last="linear")
    (tmp_path / f"{name}.pt").write_bytes(build.torch_bytes(content))
    (attribute,) = load_heads(tmp_path / f"{name}.pt").attributes
    assert (attribute.name, attribute.classes[3]) == ("category", "cat")


@pytest.mark.parametrize("name", ["last_ckpt_smile", "ckpt_20_smile", "best_valid_ckpt_smile", "smile"])
def test_A7_every_checkpoint_of_a_head_keeps_its_name_and_its_classes(tmp_path, name):
    (tmp_path / f"{name}.pt").write_bytes(build.torch_bytes(build.lace_head()[0]))
    (attribute,) = load_heads(tmp_path / f"{name}.pt").attributes
    assert (attribute.name, attribute.classes) == ("smile", ("no", "yes"))


def test_A7_the_classes_of_cats_have_their_names(write):
    breeds, haircolor = load_heads(write("breeds-haircolor", 23)[0]).attributes
    assert (len(breeds.classes), breeds.classes[12], haircolor.classes[1]) == (16, "siamese", "ginger")


def test_a_file_whose_name_says_nothing_is_refused_with_advice_that_works(tmp_path):
    path = tmp_path / "last_ckpt.pt"
    path.write_bytes(build.torch_bytes(build.lace_head()[0]))
    with pytest.raises(CheckpointError, match=r"rename it to, for example, best_valid_ckpt_NAME\.pt"):
        load_heads(path)
    assert load_heads(path.rename(tmp_path / "best_valid_ckpt_NAME.pt")).attributes[0].name == "NAME"


# --- InterFaceGAN --------------------------------------------------------------------------------------------------


def boundary(path, normal):
    path.parent.mkdir(exist_ok=True)
    np.save(path, normal)
    return path


def logits(stack, x):
    ((weight, bias),) = stack.layers
    return x @ weight.T + bias


def test_a_boundary_gives_the_signed_distance_as_logits(tmp_path):
    rng = np.random.default_rng(0)
    normal, x, centre = rng.normal(size=(1, 6)), rng.normal(size=(5, 6)), rng.normal(size=6)
    path = boundary(tmp_path / "stylegan_ffhq_smile_w_boundary.npy", normal)
    unit = normal[0] / np.linalg.norm(normal)
    stack = load_heads(path, centre=centre)
    assert (stack.name, stack.space, stack.attributes[0].classes) == ("smile", "w", ("no", "yes"))
    distance = (x - centre) @ unit
    assert np.allclose(logits(stack, x), np.stack([-distance, distance], axis=1), atol=1e-6)
    labels = {"smile": {"classes": ["sad", "happy"], "scale": 2, "offset": -0.5}}
    stated = load_heads(path, centre=centre, labels=labels)
    assert np.allclose(logits(stated, x)[:, 1], 2 * (x @ unit - 0.5), atol=1e-6)
    assert stated.attributes[0].classes == ("sad", "happy")
    assert np.allclose(logits(load_heads(path), x)[:, 1], x @ unit, atol=1e-6)


@pytest.mark.parametrize(("file", "name", "space"), [
    ("stylegan2_ffhq_z/boundary_Smiling.npy", "Smiling", "z"), ("boundaries_w/boundary_Male.npy", "Male", "w"),
    ("a/age_boundary.npy", "age", "w"), ("a/pggan_celebahq_pose_boundary.npy", "pose", "w"),
    ("a_z/boundary_5_o_Clock_Shadow.npy", "_5_o_Clock_Shadow", "z"), ("a/eye-glasses.npy", "eye_glasses", "w"),
])
def test_the_files_of_interfacegan_say_attribute_and_space(tmp_path, file, name, space):
    stack = load_heads(boundary(tmp_path / file, np.ones((1, 4))), centre=np.ones(4))
    assert (stack.name, stack.space) == (name, space)
    assert np.isclose(stack.layers[0][1][1], 0 if space == "z" else -2)


def test_a_direction_saved_by_torch_is_a_boundary_too(tmp_path):
    path = tmp_path / "age.pt"
    path.write_bytes(build.torch_bytes(torch.ones(1, 4)))
    assert np.allclose(load_heads(path).layers[0][0], [[-0.5] * 4, [0.5] * 4])


@pytest.mark.parametrize(("normal", "message"), [
    (np.ones((2, 4)), r"shape \(2, 4\)"), (np.zeros((1, 4)), "no length"), (np.float64(3), r"shape \(\)"),
    (np.array([[1, np.nan]]), "NaN"), (np.array([None, 1]), "type"), (np.array(["a"]), "type"),
    (np.ones((1, 0)), "shape"),
])
def test_an_array_that_is_no_boundary_is_refused(tmp_path, normal, message):
    with pytest.raises(CheckpointError, match=message):
        load_heads(boundary(tmp_path / "smile_boundary.npy", normal))


def test_a_numpy_file_of_objects_is_never_unpickled(tmp_path):
    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    path = boundary(tmp_path / "smile_boundary.npy", np.array([Touch()], dtype=object))
    with pytest.raises(CheckpointError, match="only numbers are read"):
        load_heads(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("wish", [{"scale": 0}, {"scale": -1}, {"scale": "a"}, {"offset": float("inf")}])
def test_a_wrong_scale_or_offset_is_refused(tmp_path, wish):
    path = boundary(tmp_path / "smile_boundary.npy", np.ones((1, 4)))
    with pytest.raises(CheckpointError, match=next(iter(wish))):
        load_heads(path, labels={"smile": wish})


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
