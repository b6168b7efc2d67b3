"""Our classifiers as ONNX files with specs, which label, judge and check like anybody's."""

from pathlib import Path

import numpy as np
import torch

from engine.bundle import sha256
from engine.classifier import BATCH, ImageClassifier
from engine.classifier_spec import AttributeSpec, InputSpec, Spec, spec_path, write_spec
from engine.errors import LaceError
from engine.folders import write_atomically
from exporter.field_graphs import IR_VERSION, OPSET, ROWS
from exporter.synthesis_graph import quiet, strip
from lace_trainer.judges.classifier import Classifier

PICTURE, OUTPUT = "picture", "outputs"
MOST_DIFFERENCE = 1e-3  # of probabilities and values, from torch's


def export_classifier(model: Classifier, path: Path, *, same_as: Path | None = None) -> Path:
    """Write ``path`` (.onnx) and its spec; compared with torch before it is called done.

    same_as   the file of the same network in our own form, for those who must not judge what it labelled
    """
    size, rows = model.shape.size, torch.export.Dim(ROWS)
    net = model.eval().to("cpu", memory_format=torch.contiguous_format)
    with quiet():
        program = torch.onnx.export(net, (torch.zeros(2, 3, size, size),), dynamo=True, opset_version=OPSET,
                                    input_names=[PICTURE], output_names=[OUTPUT], dynamic_shapes=({0: rows},),
                                    external_data=False, verbose=False)
    assert program is not None
    proto = program.model_proto
    proto.ir_version = min(proto.ir_version, IR_VERSION)
    for record in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer):
        strip(record)
    attributes = tuple(
        AttributeSpec(a.name, a.kind, a.classes, OUTPUT, span, "softmax" if a.kind == "class" else "none")
        for a, span in zip(model.attributes, model.spans, strict=True))
    facts = {key: model.metadata[key] for key in ("accuracy", "role", "data") if key in model.metadata}
    write_atomically(path, proto.SerializeToString())
    write_spec(spec_path(path), Spec(InputSpec(PICTURE, (size, size), range=(-1.0, 1.0)), attributes,
                                     same_as=(sha256(same_as),) if same_as else (), facts=facts))
    compare(model, path)
    return path


def compare(model: Classifier, path: Path) -> None:
    """Raises LaceError, and takes the files away, if ONNX Runtime does not say what torch says."""
    pictures = np.random.default_rng(0).integers(0, 256, (BATCH + 1, *(model.shape.size,) * 2, 3), np.uint8)
    read, outputs = ImageClassifier(path).read(pictures), model.outputs(pictures).double()
    for attribute, (low, high) in zip(model.attributes, model.spans, strict=True):
        if attribute.kind == "class":
            outputs[:, low:high] = outputs[:, low:high].softmax(dim=1)
    gap = float(np.abs(read - outputs.numpy()).max())
    if not gap <= MOST_DIFFERENCE:
        path.unlink()
        spec_path(path).unlink()
        raise LaceError(f"the exported classifier differs from torch's by {gap:.2g}; expected {MOST_DIFFERENCE:g} at "
                        "most: this is a fault of the export, please report it")
