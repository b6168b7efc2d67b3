"""lace-verify: golden answers replayed on a runtime."""

import json
import subprocess
import sys

import numpy as np
import pytest

from engine.bundle import GOLDEN, Bundle
from engine.cli import verify
from engine.cli.console import CHECK_FAILED, NOT_CHECKED
from engine.errors import BackendError, BundleError
from engine.runtimes import Drawing, Runtime, Solving, open_runtime
from engine.verify import Check, check_bundle, gradient_errors, small
from exporter import export
from tests import tiny


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return export(tiny.parts(), tiny.heads(), out=tmp_path_factory.mktemp("verify") / "tiny.lace")


def copy_of(bundle: Bundle, tmp_path):
    import shutil

    return shutil.copytree(bundle.path, tmp_path / "copy.lace")


class AlteredSolving(Solving):
    name, version, device = "altered", "1", "cpu"
    dtype, jacobian = np.dtype(np.float32), "fp32"

    def __init__(self, solving, gradient):
        self.solving, self.gradient = solving, gradient

    def field(self, space):
        field, gradient = self.solving.field(space), self.gradient
        pullback = field.pullback
        field.pullback = lambda cotangent: pullback(cotangent) * np.float32(gradient)
        return field


class AlteredDrawing(Drawing):
    name, version, precision = "altered", "1", "fp32"

    def __init__(self, drawing, picture):
        self.drawing, self.picture = drawing, picture

    def synthesize(self, ws, noises=None):
        return self.drawing.synthesize(ws) + np.float32(self.picture)


def altered(runtime, *, picture=0.0, gradient=1.0) -> Runtime:
    """A runtime that answers almost right."""
    return Runtime("altered", AlteredSolving(runtime.solving, gradient), AlteredDrawing(runtime.drawing, picture))


def failed(checks) -> set[str]:
    return {check.name for check in checks if check.passed is False}


def test_every_runtime_answers_as_the_network_did(bundle):
    checks = check_bundle(bundle, "onnxruntime")
    assert all(check.passed for check in checks)
    reference = check_bundle(bundle, "numpy")
    assert not failed(reference)
    assert [check.name for check in reference if check.passed is None] == ["images"]


def test_small_mistakes_are_found(bundle):
    runtime = open_runtime(bundle, "onnxruntime")
    assert failed(check_bundle(bundle, altered(runtime, picture=0.05))) == {"image", "images"}
    wrong = failed(check_bundle(bundle, altered(runtime, gradient=1.001), parts=("field",)))
    assert wrong == {f"{name}.gradient median" for name in ("smile", "age", "hair", "hat", "plane", "tilt")}


def test_not_a_number_does_not_pass(bundle):
    runtime = open_runtime(bundle, "onnxruntime")
    assert {"image", "images"} <= failed(check_bundle(bundle, altered(runtime, picture=np.nan), parts=("synthesis",)))


def test_a_flipped_unit_is_no_mistake_but_a_wrong_gradient_is():
    golden = np.random.default_rng(0).standard_normal((4, 3, 16))
    found = golden.copy()
    found[1, 2] *= 1.05
    errors = gradient_errors(found, golden)
    assert np.median(errors) == 0
    assert errors.max() == pytest.approx(0.05)


def test_pictures_are_averaged_in_boxes():
    images = np.arange(2 * 3 * 128 * 128, dtype=np.float32).reshape(2, 3, 128, 128)
    found = small(images)
    assert found.shape == (2, 3, 64, 64)
    assert found[1, 2, 5, 7] == pytest.approx(images[1, 2, 10:12, 14:16].mean())
    assert np.array_equal(small(images[:, :, :8, :8]), images[:, :, :8, :8])


@pytest.mark.parametrize("name", [GOLDEN, "synthesis.onnx", "mapping.onnx", "field.safetensors"])
def test_a_flipped_byte_is_refused_everywhere(bundle, tmp_path, name, capsys):
    folder = copy_of(bundle, tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match="is damaged"):
        Bundle(folder)
    assert verify.main([str(folder)]) == 2
    assert "is damaged" in capsys.readouterr().err.replace("\n", " ")


def test_command_line_reports(bundle, capsys, monkeypatch):
    assert verify.main([str(bundle.path)]) == 0
    assert "gradient median, worst of" in capsys.readouterr().out
    assert verify.main([str(bundle.path), "--runtime", "numpy", "--part", "field", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["passed"], facts["runtime"], facts["hash"]) == (True, "numpy", bundle.hash)
    runtime = altered(open_runtime(bundle, "onnxruntime"), picture=1.0)
    monkeypatch.setattr(verify, "open_runtime", lambda *_, **__: runtime)
    assert verify.main([str(bundle.path)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_C4_what_was_not_checked_is_no_success(bundle, capsys):
    assert verify.main([str(bundle.path), "--runtime", "numpy"]) == NOT_CHECKED
    assert "images not checked: " in capsys.readouterr().out
    assert verify.main([str(bundle.path), "--runtime", "numpy", "--json"]) == NOT_CHECKED
    assert json.loads(capsys.readouterr().out)["passed"] is None
    assert verify.verdict([]) == NOT_CHECKED
    bad = Check("w", 1.0, 0.1, False)
    assert verify.verdict([bad, Check("images", None, 0.1, None)]) == CHECK_FAILED


def test_command_line_names_what_is_wrong(bundle, tmp_path, capsys, monkeypatch):
    assert verify.main([str(tmp_path / "none.lace")]) == 2
    with pytest.raises(SystemExit, match="2"):
        verify.main([str(bundle.path), "--runtime", "abacus"])
    assert "abacus" in capsys.readouterr().err
    missing = BackendError("runtime 'onnxruntime' is not installed")
    missing.__cause__ = ImportError("onnxruntime")
    monkeypatch.setattr(verify, "open_runtime", raising(missing))
    assert verify.main([str(bundle.path)]) == 3


def raising(error):
    def open_it(*_, **__):
        raise error

    return open_it


def test_verifying_needs_no_torch(bundle):
    code = "import sys; from engine.cli.verify import main; main([sys.argv[1]]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(bundle.path)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
