"""A second discriminator, which looks through the eyes of a frozen image classifier.

A discriminator that starts from nothing is slow to notice what is rare: glasses that are drawn too seldom or wrongly. A
classifier of the attributes sees them from the first step. After Sauer et al., "Projected GANs Converge Faster",
NeurIPS 2021, but beside the ordinary discriminator, for a classifier is blind to whatever no attribute needs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lace_trainer.judges.classifier import Classifier

WIDTH = 64  # of the small discriminators
R1_GAMMA = 0.05  # their penalty, every r1_interval steps


class FeatureDiscriminator(nn.Module):
    """A small discriminator for each stage of the classifier.  picture (n, 3, R, R) in [-1, 1] -> logits (n, stages)

    The classifier is not among the parameters nor in the state: it never learns.
    """

    def __init__(self, classifier: Classifier, dtype: torch.dtype = torch.float32):
        super().__init__()
        frozen = classifier.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        object.__setattr__(self, "classifier", frozen)
        self.dtype = dtype
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, WIDTH, 3, 2 if stage < 3 else 1, 1), nn.LeakyReLU(0.2),
                nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(WIDTH, 1, 1),
            )
            for stage, width in enumerate(classifier.shape.widths)
        )

    def forward(self, picture: Tensor) -> Tensor:
        with torch.autocast(picture.device.type, self.dtype, enabled=self.dtype != torch.float32):
            stages = self.stages(picture.contiguous(memory_format=torch.channels_last))
            logits = [head(stage).float().mean(dim=(1, 2, 3)) for head, stage in zip(self.heads, stages, strict=True)]
        return torch.stack(logits, dim=1)

    def stages(self, picture: Tensor) -> list[Tensor]:
        """What the classifier sees: after its stem, and after each of its stages."""
        net = self.classifier
        x = F.relu(net.stem_norm(net.stem(picture)))
        found, blocks = [x], iter(net.blocks)
        for depth in net.shape.depths:
            for _ in range(depth):
                x = next(blocks)(x)
            found.append(x)
        return found
