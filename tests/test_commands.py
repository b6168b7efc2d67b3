"""What newcomers and strangers' files meet on the command line: text, options, recipes, latents, errors of the system.

Tests are named after the entry of the list of faults that they answer.
"""

import json
import os
import subprocess
import sys
import tracemalloc
from functools import reduce
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from engine import ConditionError, Request, RequestError, Sampler, __version__, attr
from engine.bundle import MANIFEST
from engine.cli import bench, edit, info, sample, verify, writing
from engine.cli.console import BAD_INPUT, CHECK_FAILED, MISSING_PACKAGE, OK, UNREAD, Terminal
from engine.cli.latents import read_latents
from engine.cli.options import UsageError
from engine.cli.readings import notes
from engine.cli.recipe import RECIPE
from engine.grammar import parse
from engine.runtimes import MissingRuntime, packages
from engine.runtimes.packages import installed
from engine.text import code, markdown, table_row, to_json, visible
from exporter import cli as export_command
from exporter import export
from lace_evaluation import cli as eval_command
from lace_trainer import cli as train_command
from tests import tiny
from tests.test_cli import complaint, listing, picture, usage_error

COMMANDS = {"lace-sample": sample.main, "lace-edit": edit.main, "lace-info": info.main, "lace-verify": verify.main,
            "lace-bench": bench.main, "lace-export": export_command.main, "lace-train": train_command.main,
            "lace-eval": eval_command.main}
HOSTILE = "[/c]\x1b[31m\u202ered"
SHOWN = "[/c]\\x1b[31m\\u202ered"
MARKUP = "[/c][red]<b>|:smile:"  # printable, so that a bundle may hold it


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return export(tiny.parts(), tiny.heads(), out=tmp_path_factory.mktemp("commands") / "tiny.lace")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    heads = [tiny.stack("smile", {"smile": 2})]
    return export(tiny.parts(labels=3), heads, out=tmp_path_factory.mktemp("conditional") / "tiny.lace")


@pytest.fixture
def hostile(bundle, tmp_path):
    """The bundle with names in its manifest that a terminal, a page or rich would take for more than names."""
    import shutil

    folder = shutil.copytree(bundle.path, tmp_path / "hostile.lace")
    body = json.loads((folder / MANIFEST).read_text())
    body["generator"]["name"] = MARKUP
    for attribute in body["attributes"]:
        attribute["classes"] = [MARKUP if name == "c0" else name for name in attribute["classes"]]
    body["provenance"]["licence"] = HOSTILE
    (folder / MANIFEST).write_text(json.dumps(body))
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def run(main, *arguments) -> int:
    return main([str(argument) for argument in arguments])


# --- text ---------------------------------------------------------------------------------------------------------


def test_C6_text_shows_what_it_holds():
    assert visible(HOSTILE) == SHOWN
    assert visible("a\nb\tc") == "a\\nb\\tc"
    assert visible("a\nb", lines=True) == "a\nb"
    assert visible("± Größe 日本") == "± Größe 日本"


@pytest.mark.parametrize("text", ["<b>", "[a](http://b.c)", "`x`", "_x_", "*x*", "a|b", "&lt;", "www.a.b", "~~x~~"])
def test_C6_markdown_marks_nothing_up(text):
    assert "".join(markdown(text).split("\\")) == text
    assert markdown(text) != text


def test_C6_a_cell_of_a_table_does_not_end_early():
    assert markdown("hair_color & ~hat") == "hair_color & \\~hat"
    assert code("a``b") == "```a``b```"
    assert table_row(["a|b", "c\\|d", "e\\\\|f"]) == "| a\\|b | c\\|d | e\\\\\\|f |"


def test_C12_json_has_no_infinity():
    assert json.loads(to_json({"energy": float("inf"), "more": [float("nan"), 1.5]})) == {"energy": None,
                                                                                          "more": [None, 1.5]}


def test_C6_a_terminal_marks_nothing_up(capsys):
    Terminal().print(HOSTILE, "[red]a[/red] :smile:")
    Terminal().say(f"{HOSTILE}\nsecond")
    assert capsys.readouterr().out == f"{SHOWN} [red]a[/red] :smile:\n{SHOWN}\nsecond\n"


def test_C6_names_of_strangers_reach_no_terminal_and_no_picture(hostile, tmp_path, capsys):
    out = tmp_path / "[/x]\x1b[31m"
    assert run(info.main, hostile) == OK
    assert run(verify.main, hostile) == OK
    assert run(sample.main, hostile, "smile=c1", "--count", 2, "--out", out, "-v") == OK
    assert run(edit.main, hostile, "smile=c1", "--out", out, "--overwrite") == OK
    assert run(info.main, hostile, "--json") == OK
    assert run(sample.main, hostile, "--out", out) == BAD_INPUT
    captured = capsys.readouterr()
    assert "\x1b[31m" not in captured.out + captured.err
    for path in out.glob("*.png"):
        assert not any("\x1b" in text or "\u202e" in text for text in picture(path).text.values())


def test_C6_names_of_strangers_are_shown_escaped(hostile, out, capsys):
    assert run(info.main, hostile) == OK
    shown = capsys.readouterr().out
    assert f"{MARKUP}: stylegan2-skip" in shown
    assert f"licence: {SHOWN}" in shown
    assert run(edit.main, hostile, "hair=c1", "--out", out) == OK
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed
    assert "[/c]" in printed


def test_C6_a_bundle_with_unprintable_names_is_refused_in_printable_words(hostile, capsys):
    body = json.loads((hostile / MANIFEST).read_text())
    body["generator"]["name"] = HOSTILE
    (hostile / MANIFEST).write_text(json.dumps(body))
    assert run(info.main, hostile) == BAD_INPUT
    said = capsys.readouterr().err
    assert "printable" in said
    assert "\x1b" not in said


# --- lace-info ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "main"), COMMANDS.items())
def test_C12_every_command_says_its_version(name, main, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == OK
    assert capsys.readouterr().out == f"{name} (lace-engine) {__version__}\n"


def test_C12_attributes_of_a_bundle_can_be_listed(capsys):
    assert run(info.main, "demo") == OK
    printed = capsys.readouterr().out
    for words in ("age", "0.07 to 0.96", "black, brown, blond", "0.957", "solver posterior", "confidence 0.9",
                  "field.safetensors", "licence: ", "stylegan2-skip, 64 px", "generator.safetensors"):
        assert words in printed
    assert run(info.main, "demo", "--json") == OK
    facts = json.loads(capsys.readouterr().out)
    assert facts["attributes"][0]["range"] == [0.07, 0.96]
    assert facts["bytes"] == sum(facts["files"].values())


def test_every_example_of_info_is_a_condition_that_the_bundle_knows(bundle):
    sampler = Sampler(bundle)
    for attribute in info.facts_of(bundle)["attributes"]:
        sampler.starts.lower(parse(attribute["example"]))


def test_a_licence_is_read_from_the_bundle_and_not_through_a_link(bundle, tmp_path):
    import shutil

    from engine import Bundle

    folder = shutil.copytree(bundle.path, tmp_path / "copy.lace")
    assert info.licence(Bundle(folder)) is None
    (tmp_path / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    assert info.licence(Bundle(folder)) is None
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").write_text("\n  MIT License\n\nCopyright")
    assert info.licence(Bundle(folder)) == "MIT License (LICENSE)"


# --- many pictures ------------------------------------------------------------------------------------------------


def peak(out, count) -> int:
    tracemalloc.start()
    try:
        assert run(sample.main, "demo", "--count", count, "--json", "--out", out, "--overwrite") == OK
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_C5_memory_does_not_grow_with_the_number_of_pictures(out, capsys):
    """A picture of the demo has 12 kB: 300 more, if they were kept, would be 3.7 MB and their records as much again."""
    peak(out, 100)  # what is loaded once
    few, many = peak(out, 100), peak(out, 400)
    assert len(list(out.glob("[0-9]*.png"))) == 400
    assert many - few < 1e6
    capsys.readouterr()


def test_C5_the_grid_has_a_bounded_number_of_tiles_and_says_so(bundle, out, capsys, monkeypatch):
    monkeypatch.setattr(writing, "TILES", 4)
    monkeypatch.setattr(sample, "TILES", 4)
    monkeypatch.setattr(sample, "CHUNK", 3)
    monkeypatch.setattr(sample, "GROUP", 2)
    assert run(sample.main, bundle.path, "smile=c1", "--count", 7, "--seed", 5, "--out", out) == OK
    assert "shows the first 4" in capsys.readouterr().out
    assert picture(out / "grid.png").size == (2 * 130 - 2, 2 * 130 - 2)
    assert picture(out / "grid.png").text["Seed"] == "5..8"
    body = json.loads((out / "samples.json").read_text())
    assert body["grid"] == 4
    assert [entry["seed"] for entry in body["samples"]] == list(range(5, 12))
    assert [entry["file"] for entry in body["samples"]] == [f"{i:04}.png" for i in range(7)]
    drawn = Sampler(bundle).sample("smile=c1", range(5, 12))
    for i, one in enumerate(drawn):
        assert np.array_equal(picture(out / f"{i:04}.png"), one.image)


def test_C5_large_tiles_are_shrunk():
    grid = writing.Grid(1000)
    grid.add(0, Image.new("RGB", (1024, 1024)))
    grid.add(64, Image.new("RGB", (1024, 1024)))
    assert {number: tile.size for number, tile in grid.tiles.items()} == {0: (512, 512)}


def test_records_keep_the_order_of_their_numbers(tmp_path):
    with writing.record_file(tmp_path / "samples.json", {"a": 1}) as records:
        for number in (2, 0, 3, 1):
            records.add(number, {"number": number})
    assert json.loads((tmp_path / "samples.json").read_text()) == {"a": 1, "samples": [{"number": n} for n in range(4)]}


# --- lace-edit ----------------------------------------------------------------------------------------------------


def test_C8_an_edit_is_readable_without_colour(bundle, out, capsys):
    assert run(edit.main, bundle.path, "smile=c1", "age=0.9", "--seed", 4, "--out", out) == OK
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("asked", "kept", "moved: not asked for"))
    body = json.loads((out / "samples.json").read_text())
    assert "changes" not in body["samples"][0]
    assert body["samples"][1]["changes"]["smile"] == body["samples"][2]["changes"]["age"] == "asked"
    assert body["legend"] == edit.LEGEND
    assert set(body["samples"][1]["changes"]) == set(bundle.attributes)


@pytest.mark.parametrize(("before", "after", "word"), [
    (0.52, 0.53, edit.KEPT), (0.5, 0.61, edit.MOVED), (0.5, float("nan"), edit.MOVED),
    ({"a": 0.95, "b": 0.05}, {"a": 0.9, "b": 0.1}, edit.KEPT),
    ({"a": 0.95, "b": 0.05}, {"a": 0.8, "b": 0.2}, edit.MOVED),
    ({"a": 0.51, "b": 0.49}, {"a": 0.49, "b": 0.51}, edit.MOVED),
])
def test_C8_moved_is_more_than_a_tenth_or_another_class(before, after, word):
    found = edit.changes([parse("hat")], [{"hat": 0.0, "x": before}, {"hat": 1.0, "x": after}])
    assert found == [{"hat": edit.ASKED, "x": word}]


def test_C8_rows_of_an_edit_that_are_not_finite_are_reported_and_json_stays_valid(bundle, out, capsys):
    assert run(edit.main, bundle.path, "age=1e38", "--out", out) == OK
    assert "met a value that is not finite" in capsys.readouterr().out
    text = (out / "samples.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


# --- again --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    [], ["--guidance", "3", "--truncation", "0.4"], ["--solver", "langevin", "--steps", "5"],
    ["--solver", "dopri5", "--rtol", "0.01", "--clock", "paper"], ["--logic", "lace", "--temperature", "2"],
    ["--nvidia-seed", "7"], ["--runtime", "onnxruntime"], ["--precision", "fp32", "--capacity", "3"],
], ids=" ".join)
def test_C10_a_picture_is_drawn_again_bit_by_bit(bundle, out, tmp_path, capsys, options):
    text = "smile=c1 & age=0.75 & near(0.1) & keep(hair, weight=0.02)"
    assert run(sample.main, bundle.path, text, "--count", 2, "--out", out, *options) == OK
    again = tmp_path / "again"
    assert run(sample.main, "--again", out / "0001.png", bundle.path, "--out", again) == OK
    assert "has the same bits as" in capsys.readouterr().out
    assert np.array_equal(picture(out / "0001.png"), picture(again / "again.png"))
    assert run(sample.main, "--again", again / "again.png", bundle.path, "--out", again, "--overwrite") == OK


def test_C10_label_and_latents_are_in_the_picture(conditional, bundle, out, tmp_path, capsys):
    assert run(sample.main, conditional.path, "smile=c1", "--label", 2, "--count", 1, "--out", out) == OK
    assert run(sample.main, "--again", out / "0000.png", conditional.path, "--out", tmp_path / "a") == OK
    np.save(tmp_path / "w.npy", Sampler(bundle).sample(None, 3)[0].w)
    assert run(sample.main, bundle.path, "age=0.75", "--w", tmp_path / "w.npy", "--out", out, "--overwrite") == OK
    (tmp_path / "w.npy").unlink()
    assert run(sample.main, "--again", out / "0000.png", bundle.path, "--out", tmp_path / "b") == OK


def test_C10_a_stage_of_an_edit_is_drawn_again(bundle, out, tmp_path, capsys):
    arguments = ["--start", "hat=c1", "--keep", "hair, tilt", "--near", "0.01", "--forget"]
    assert run(edit.main, bundle.path, "smile=c1", "age=0.9", *arguments, "--out", out) == OK
    for name in ("00.png", "02.png"):
        assert run(sample.main, "--again", out / name, bundle.path, "--out", tmp_path / name) == OK
    assert "same bits" in capsys.readouterr().out


def test_C10_what_differs_is_said(bundle, conditional, out, tmp_path, capsys):
    assert run(sample.main, bundle.path, "smile=c1", "--count", 1, "--out", out) == OK
    path, again = out / "0000.png", tmp_path / "again"
    capsys.readouterr()
    arguments = ["--again", path, bundle.path, "--guidance", 2, "--out", again]
    assert "--guidance is part of what the picture says" in complaint(sample.main, arguments, capsys)
    assert "a bundle with the hash" in complaint(sample.main, ["--again", path, "--out", again], capsys)
    assert "no recipe inside" in complaint(sample.main, ["--again", out / "grid.png", "--out", again], capsys)
    assert "cannot read" in complaint(sample.main, ["--again", out / "none.png", "--out", again], capsys)
    assert listing(tmp_path) == ["out"]
    with Image.open(path) as old:
        text, pixels = old.text, np.array(old)
    pixels[0, 0, 0] ^= 1
    body = json.loads(text[RECIPE])
    body["engine"]["versions"]["numpy"] = "1.0"
    save(path, pixels, body)
    assert run(sample.main, "--again", path, bundle.path, "--out", again) == CHECK_FAILED
    printed = capsys.readouterr().out
    assert "has other bits than" in printed
    assert "by at most 1 of 255" in printed
    assert f"numpy: 1.0 then, {np.__version__} now" in printed


def save(path, pixels, body):
    chunk = PngInfo()
    chunk.add_itxt(RECIPE, body if isinstance(body, str) else json.dumps(body))
    Image.fromarray(pixels).save(path, pnginfo=chunk)


@pytest.mark.parametrize(("place", "value"), [
    (("form",), 2), (("engine",), []), (("engine", "solver"), "__import__"), (("engine", "settings"), {"steps": 10**9}),
    (("engine", "settings"), {"shell": 1}), (("engine", "settings", "rtol"), "1"), (("engine", "logic"), None),
    (("engine", "settings", "rtol"), float("nan")), (("engine", "runtime"), "../x"), (("engine", "capacity"), 10**9),
    (("engine", "capacity"), True), (("engine", "guidance"), float("inf")), (("engine", "versions"), {"a": {}}),
    (("engine", "generator"), HOSTILE * 9999), (("request", "seed"), -1), (("request", "seed"), 2**64),
    (("request", "condition"), "("), (("request", "condition"), "~" * 900 + "a"), (("request", "label"), "0"),
    (("request", "truncation"), None), (("request", "start"), {"space": "w", "float32": "!"}),
    (("request", "start"), {"space": "w", "float32": "AAAA"}), (("request", "start"), {"space": "../", "float32": ""}),
    (("request", "start"), {"space": "z", "float32": "AAAAAA=="}), (("request", "start"), {"nvidia_seed": 2**32}),
    (("edits",), [{}] * 1001), (("edits",), [{"condition": "smile=c1", "strict": True}]), (("edits",), {}),
    (("edits",), [{"condition": "smile=c1", "keep": [1]}]), ((), "["), ((), "[" * 100_000), ((), "null"), ((), "{}"),
], ids=lambda value: str(value)[:40])
def test_C10_recipes_of_strangers_are_refused(bundle, tmp_path, capsys, place, value):
    out = tmp_path / "out"
    assert run(sample.main, bundle.path, "smile=c1", "--count", 1, "--out", out) == OK
    with Image.open(out / "0000.png") as image:
        body, pixels = json.loads(image.text[RECIPE]), np.array(image)
    if place:
        *path, last = place
        reduce(lambda part, name: part[name], path, body)[last] = value
    save(tmp_path / "x.png", pixels, body if place else value)
    capsys.readouterr()
    said = complaint(sample.main, ["--again", tmp_path / "x.png", bundle.path, "--out", tmp_path / "again"], capsys)
    assert "error: " in said
    assert "\x1b" not in said
    assert len(said) < 1000
    assert not (tmp_path / "again").exists()


# --- latents of other tools ---------------------------------------------------------------------------------------


def test_A7_nvidias_seed_numbers_draw_its_latents(bundle, out, tmp_path, capsys):
    assert run(sample.main, bundle.path, "--nvidia-seed", 85, "--count", 2, "--out", out) == OK
    zs = [np.random.RandomState(seed).randn(1, 16)[0].astype(np.float32) for seed in (85, 86)]
    for i, drawn in enumerate(Sampler(bundle).sample([Request(z=z) for z in zs])):
        assert np.array_equal(picture(out / f"000{i}.png"), drawn.image)
    assert run(edit.main, bundle.path, "smile=c1", "--nvidia-seed", 85, "--out", tmp_path / "edit") == OK
    assert np.array_equal(picture(tmp_path / "edit" / "00.png"), picture(out / "0000.png"))
    arguments = [bundle.path, "--nvidia-seed", 1, "--seed", 1, "--out", tmp_path / "x"]
    capsys.readouterr()
    assert "give one of them" in complaint(sample.main, arguments, capsys)


def test_C13_pictures_begin_at_latents_of_files(bundle, out, tmp_path, capsys):
    w = np.stack([sample.w for sample in Sampler(bundle).solve(None, range(3))])
    layers = np.repeat(w[:, None], bundle.generator.num_ws, axis=1)
    np.save(tmp_path / "w.npy", w)
    np.savez(tmp_path / "projected_w.npz", w=layers, other=np.zeros(3))
    save_file({"latents": w}, tmp_path / "w.safetensors")
    for name in ("w.npy", "projected_w.npz", "w.safetensors"):
        assert np.array_equal(read_latents(tmp_path / name, "w", 16), w)
        assert run(sample.main, bundle.path, "--w", tmp_path / name, "--out", out, "--overwrite") == OK
        assert [np.array_equal(picture(out / f"000{i}.png"), one.image)
                for i, one in enumerate(Sampler(bundle).sample(None, range(3)))] == [True] * 3
    capsys.readouterr()
    arguments = [bundle.path, "--w", tmp_path / "w.npy", "--count", 4, "--out", tmp_path / "x"]
    assert "holds 3 latents" in complaint(sample.main, arguments, capsys)


def test_latents_that_cannot_be_used_are_refused_and_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([print, {}], object), allow_pickle=True)
    np.save(tmp_path / "texts.npy", np.array(["a"]))
    np.save(tmp_path / "nan.npy", np.full((1, 16), np.nan))
    np.save(tmp_path / "wide.npy", np.zeros((1, 17)))
    np.save(tmp_path / "none.npy", np.zeros((0, 16)))
    np.save(tmp_path / "large.npy", np.full((1, 16), 1e300))
    np.save(tmp_path / "plus.npy", np.arange(32.0).reshape(1, 2, 16))
    (tmp_path / "text.npy").write_text("no")
    (tmp_path / "zip.npz").write_bytes(b"PK nonsense")
    (tmp_path / "st.safetensors").write_bytes(b"\xff" * 40)
    whole = (tmp_path / "wide.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(whole[:-8])
    (tmp_path / "huge.npy").write_bytes(whole.replace(b"(1, 17), }       ", b"(99999999999, 17)")[:128])
    (tmp_path / "folder").mkdir()
    for path in [*tmp_path.iterdir(), tmp_path / "missing"]:
        with pytest.raises(UsageError):
            read_latents(path, "w", 16)


# --- errors of the system -----------------------------------------------------------------------------------------


def shell(*arguments, **settings) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], env=environment, stderr=subprocess.PIPE,
                          text=True, check=False, **settings)


def test_B5_a_pipe_that_nobody_reads_ends_quietly():
    reading, writing_end = os.pipe()
    os.close(reading)
    try:
        done = shell("engine.cli.info", "demo", stdout=writing_end)
    finally:
        os.close(writing_end)
    assert (done.returncode, done.stderr) == (UNREAD, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_B5_a_full_disk_is_named():
    with open("/dev/full", "w") as full:
        done = shell("engine.cli.info", "demo", stdout=full)
    assert done.returncode == BAD_INPUT
    assert done.stderr == ("error: cannot write the output: no space left on device; free some space, or choose "
                           "another --out\n")


def test_B5_errors_of_the_system_name_the_place_and_what_to_do(bundle, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = complaint(sample.main, [bundle.path, "--out", tmp_path / "file" / "out"], capsys)
    assert str(tmp_path / "file") in said
    assert "Errno" not in said


# --- packages -----------------------------------------------------------------------------------------------------


def test_C9_packages_are_looked_for_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("exporter.exporting.export", lambda *_, **__: pytest.fail("worked"))
    assert run(export_command.main, "--gan", "x.pkl") == MISSING_PACKAGE
    said = capsys.readouterr().err
    assert "package 'onnxruntime' is missing; install it with: pip install 'lace-engine[export]'" in said
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run(train_command.main, "score", "--gan", "x.pkl") == MISSING_PACKAGE
    assert "package 'torch' is missing; install it with: pip install 'lace-engine[train]'" in capsys.readouterr().err
    assert run(eval_command.main, "demo") == MISSING_PACKAGE


def test_C9_names_of_attributes_are_checked_before_the_samples(tmp_path, capsys, monkeypatch):
    from lace_trainer.attributes import Attribute
    from lace_trainer.heads import labellers as module
    from lace_trainer.heads import pairs

    labellers = type("Fake", (), {"attributes": (Attribute("smile", "class", ("no", "yes")),)})()
    monkeypatch.setattr(module, "Labellers", lambda _: labellers)
    monkeypatch.setattr(pairs, "sampled_pairs", lambda *_, **__: pytest.fail("sampled"))
    arguments = ["heads", "--gan", "x", "--labeller", "y", "--attributes", "smlie", "--out", str(tmp_path / "out")]
    assert train_command.main(arguments) == BAD_INPUT
    said = capsys.readouterr().err
    assert "there are no labels for 'smlie'; there are some for: smile; did you mean 'smile'?" in said


def test_C7_what_is_left_of_onnxruntime_is_recognised(monkeypatch):
    both = {"onnxruntime": "1.31", "onnxruntime-gpu": "1.31"}
    monkeypatch.setattr(packages, "installed", lambda names: {"onnxruntime-gpu": "1.31"})
    with pytest.raises(MissingRuntime, match="pip install --force-reinstall --no-deps onnxruntime-gpu"):
        packages.check_onnxruntime(ModuleType("onnxruntime"))
    monkeypatch.setattr(packages, "installed", lambda names: both)
    assert "both installed" in packages.cuda_advice()
    import onnxruntime

    packages.check_onnxruntime(onnxruntime)
    assert installed(["numpy"]) == {"numpy": np.__version__}


# --- conditions and requests --------------------------------------------------------------------------------------


def test_C12_a_value_outside_the_known_range_is_a_note(out, capsys):
    assert run(sample.main, "demo", "age=50", "--count", 1, "--out", out) == OK
    assert "note: age=50 lies outside the range that the bundle knows, age from 0.07 to 0.96" in capsys.readouterr().err
    assert run(edit.main, "demo", "age=0.5", "age=50", "--out", out, "--overwrite") == OK
    assert capsys.readouterr().err.count("note: ") == 1


@pytest.mark.parametrize(("text", "count"), [
    ("age=0.5", 0), ("age>0.5", 0), ("age>1", 1), ("age<0", 1), ("~(age=2)", 1), ("2*(age=2 | smile)", 1),
    ("0.3<age<0.6", 0), ("haircolor=2", 0),
])
def test_C12_notes_are_about_values_that_no_data_covered(text, count):
    assert len(notes(parse(text), Sampler("demo").bundle.attributes)) == count


def test_B15_conditions_may_not_be_nested_beyond_the_documented_depth():
    deepest = reduce(lambda part, _: ~part, range(15), attr("smile"))
    assert parse(str(deepest)) == deepest
    hash(deepest)
    for build in (lambda: ~deepest, lambda: reduce(lambda c, _: ~(c & attr("a")), range(900), attr("a")),
                  lambda: reduce(lambda c, _: 2 * (c | (attr("a"))), range(900), attr("a")),
                  lambda: parse("~" * 900 + "a"), lambda: parse("(" * 900 + "a" + ")" * 900)):
        with pytest.raises(ConditionError, match="deeper than 16"):
            build()


def test_C12_equality_with_a_number_is_no_condition_and_says_how_to_write_one():
    for slip in (lambda: attr("age") == 0.5, lambda: attr("age") != 0.5, lambda: attr("hair") == "blond",
                 lambda: attr("age") == 0.5, lambda: attr("age") == np.float64(0.5)):
        with pytest.raises(ConditionError, match=r"write attr\(name, "):
            slip()
    assert attr("age", 0.5) == attr("age", 0.5)
    assert attr("age", 0.5) != attr("age", 0.6)
    assert attr("age") != None  # noqa: E711
    assert ~attr("a") != 2 * attr("a")
    assert len({attr("a") & attr("b"), parse("a & b"), attr("a") | attr("b")}) == 2


def test_C12_seeds_are_integers_of_any_kind():
    sampler = Sampler("demo")
    assert [s.seed for s in sampler.solve(None, np.int64(3))] == [3]
    assert [s.seed for s in sampler.solve(None, np.arange(2))] == [0, 1]
    for bad in (-1, 1.5, "3", 2**64):
        with pytest.raises(RequestError):
            Request("smile", seed=bad)
    with pytest.raises(RequestError, match=r"seed 1\.5"):
        sampler.solve(None, 1.5)
    with pytest.raises(RequestError, match="label"):
        Request(label="cat")


@pytest.mark.parametrize(("main", "arguments", "message"), [
    (train_command.main, ["heads", "--gan", "x", "--out", "y", "--epohcs", "3"], "did you mean --epochs?"),
    (train_command.main, ["gan", "--data", "x", "--out", "y", "--rate", "nan"], "nan is not a positive number"),
    (eval_command.main, ["demo", "--suite", "gaol"], "there is no suite 'gaol'; did you mean goal?"),
    (export_command.main, ["--gan", "x", "--truncation", "half"], "'half' is not a number"),
    (verify.main, ["demo", "--threads", "-1"], "-1 is not in 0.."),
    (info.main, ["demo", "--jsno"], "did you mean --json?"),
    (info.main, ["demo", "\x1b[31m"], "unrecognised argument"),
])
def test_slips_of_the_keyboard_are_answered(main, arguments, message, capsys):
    said = usage_error(main, arguments, capsys)
    assert message in said
    assert "\x1b" not in said
