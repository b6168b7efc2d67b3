"""Generators of other families, which users of StyleGAN have too: what they are and what can be done instead."""

import re
from collections.abc import Iterable

INSTEAD = ("give an ONNX file of it that leads from z to a picture, or its class with --module "
           "(docs/your-own-generator.md)")
STYLEGAN_XL = ("a StyleGAN-XL generator: it embeds classes by a pre-trained network and has a centre of truncation for "
               "each class")
EG3D = "an EG3D generator: it renders a volume and needs a camera for each picture, beside its latent"
FASTGAN = ("a FastGAN generator (the 'light' one of Projected GAN): it has no mapping network and no styles; "
           "Projected GAN's generators of the kind stylegan2 are read")
LUCIDRAINS = ("a generator of lucidrains' stylegan2-pytorch: its network resamples and adds noise in other ways than "
              "StyleGAN2")
STYLEGAN1 = "a StyleGAN1 generator: it normalises features instead of weights"
BIGGAN = "a BigGAN generator: it has no mapping network and is conditioned by class embeddings"
# By the names of tensors, without whatever stands in front of the whole network.
TENSORS = {
    r"(.*\.)?mapping\.embed_proj\.\w+": STYLEGAN_XL,
    r"(.*\.)?(backbone\.synthesis|superresolution)\..*": EG3D,
    r"(.*\.)?(init\.init\.0|feat_\d+|se_\d+)\..*": FASTGAN,
    r"(.*\.)?(initial_block|to_initial_block\.weight)": LUCIDRAINS,
    r"(.*\.)?(g_synthesis\.blocks|progression\.0|synthesis\.layer0)\..*": STYLEGAN1,
    r"(.*\.)?(gen_z|generator\.gen_z)\..*": BIGGAN,
}
# By the names of classes, with the module in front where the pickle has it.
CLASSES = {
    r"SuperresGenerator|SynthesisNetworkFromStem|SynthesisLayerUpsampled": STYLEGAN_XL,
    r"TriPlaneGenerator|OSGDecoder|ImportanceRenderer|SuperresolutionHybrid\w*": EG3D,
    r"Fastgan\w*|UpBlock\w*": FASTGAN,
}


def of_tensors(names: Iterable[str]) -> str | None:
    """The sentence for a network with tensors of these names, None if it is none of these families."""
    return search(TENSORS, names)


def of_classes(names: Iterable[str]) -> str | None:
    """The sentence for a network with modules of these classes."""
    return search(CLASSES, (name.rpartition(".")[2] for name in names))


def search(table: dict[str, str], names: Iterable[str]) -> str | None:
    names = list(names)
    for pattern, what in table.items():
        if any(re.fullmatch(pattern, name[:200]) for name in names):
            return f"this is {what}. Its files are not read as they are: {INSTEAD}"
    return None
