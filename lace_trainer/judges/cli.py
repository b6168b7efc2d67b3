"""The commands of lace-train about networks that look at pictures: classifier and identity."""

import argparse
import logging
from pathlib import Path

from engine.cli.console import Terminal, new_table
from engine.cli.options import UsageError, flag, positive
from lace_trainer.gan.cli import Report
from lace_trainer.heads.cli import scale

log = logging.getLogger(__name__)
RENDERED, RENDERED_VALIDATION, RENDERED_EPOCHS = 40_000, 4000, 7
PHOTOGRAPH_EPOCHS, PHOTOGRAPH_SIZE = 20, 64


def add_classifier(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--role", choices=("labeller", "judge"),
                        help="of rendered faces: labels samples for the heads, or measures ACC")
    source.add_argument("--data", type=Path, metavar="FOLDER", help="of photographs: with --table, or with one folder "
                        "of pictures for each class")
    source.add_argument("--convert", type=Path, metavar="FILE", help="write ONNX and spec of a .safetensors classifier")
    add("--out", required=True, type=Path, metavar="FILE",
        help="the .safetensors file to write; FILE.onnx and its spec come beside it")
    add("--table", type=Path, metavar="FILE", help="labels of the photographs: a CSV with their names in the first "
        "column, or CelebA's list_attr_celeba.txt")
    add("--attributes", nargs="+", metavar="NAME", help="only these columns of the table (all)")
    add("--attribute", metavar="NAME", help="what folders of classes are classes of (the name of --data)")
    add("--scale", type=scale, nargs="+", action="extend", default=[], metavar="NAME=X",
        help="value = X * number of the table, as age=0.01 of years")
    add("--size", type=positive, metavar="N", help=f"side of photographs, a multiple of 16 ({PHOTOGRAPH_SIZE})")
    add("--mirror", action="store_true", help="of photographs: mirrored ones too, where no attribute has a side")
    add("--balance", action=argparse.BooleanOptionalAction, help="of photographs: rare classes count more (yes)")
    add("--pictures", type=positive, metavar="N", help=f"rendered faces to train on ({RENDERED})")
    add("--validation", type=positive, metavar="N",
        help=f"pictures to validate on ({RENDERED_VALIDATION} rendered faces; a tenth of the photographs)")
    add("--epochs", type=positive, help=f"({RENDERED_EPOCHS}; of photographs {PHOTOGRAPH_EPOCHS})")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="(bf16)")
    add("--cache", type=Path, metavar="DIR", help="where pictures are kept (the folder of --out)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")


def add_identity(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="FILE", help="the .safetensors file to write")
    add("--people", type=positive, default=6000, help="rendered people to learn from (6000)")
    add("--views", type=positive, default=6, help="pictures of each (6)")
    add("--held-out", type=positive, default=500, help="people to be judged by (500)")
    add("--steps", type=positive, default=1200, help="(1200)")
    add("--precision", choices=("fp32", "bf16"), default="bf16", help="(bf16)")
    add("--cache", type=Path, metavar="DIR", help="where rendered people are kept (the folder of --out)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")


def check_options(options: argparse.Namespace) -> None:
    photographs = ("table", "attributes", "attribute", "scale", "size", "mirror", "balance")
    if not options.data:
        for name in photographs:
            if getattr(options, name) not in (None, False, []):
                raise UsageError(f"{flag(name)} is about photographs: it needs --data FOLDER")
    elif options.pictures:
        raise UsageError("--pictures is the number of rendered faces: leave it out beside --data")
    if options.data and options.attribute and options.table:
        raise UsageError("--attribute names the classes of folders: with --table its columns have names")
    if options.convert:
        for name in ("pictures", "validation", "epochs"):
            if getattr(options, name):
                raise UsageError(f"{flag(name)} is about training: leave it out beside --convert")
    if options.out.suffix == ".onnx" and not options.convert:
        raise UsageError(f"--out is the .safetensors file, beside which the .onnx is written: give "
                         f"{options.out.with_suffix('.safetensors')}")


def train_classifier(options: argparse.Namespace, report: Report) -> dict:
    from lace_trainer.judges import classifier
    from lace_trainer.judges.onnx_export import export_classifier

    check_options(options)
    if options.convert:
        path = options.out if options.out.suffix == ".onnx" else onnx_beside(options.out)
        export_classifier(classifier.load(options.convert), path, same_as=options.convert)
        return {"onnx": str(path)}
    model = train_on_photographs(options, report) if options.data else train_on_renders(options, report)
    classifier.save(model, options.out)
    onnx = export_classifier(model, onnx_beside(options.out), same_as=options.out)
    return {"classifier": str(options.out), "onnx": str(onnx), **model.metadata}


def onnx_beside(path: Path) -> Path:
    """'x/judge.safetensors' -> 'x/judge.onnx'."""
    return path.with_name(path.name.removesuffix(".safetensors") + ".onnx")


def train_on_renders(options: argparse.Namespace, report: Report):
    from lace_trainer.faces import ATTRIBUTES
    from lace_trainer.faces.pictures import rendered
    from lace_trainer.judges import classifier

    role, cache = classifier.ROLES[options.role], options.cache or options.out.parent
    size, seed = role.shape.size, role.seed if options.seed is None else options.seed
    count = options.pictures or RENDERED
    validation = rendered(options.validation or RENDERED_VALIDATION, size, classifier.VALIDATION_SEED, cache)
    data = rendered(count, size, role.pictures_seed, cache)
    config = classifier.ClassifierConfig(epochs=options.epochs or RENDERED_EPOCHS, seed=seed,
                                         precision=options.precision, device=options.device)
    model = classifier.train(role.shape, ATTRIBUTES, data, config, validation=validation, progress=report)
    model.metadata |= {"role": options.role, "data": f"render:{count}",
                       "pictures_seed": role.pictures_seed, "validation_seed": classifier.VALIDATION_SEED}
    return model


def train_on_photographs(options: argparse.Namespace, report: Report):
    from lace_trainer.judges import photographs
    from lace_trainer.judges.classifier import ClassifierConfig
    from lace_trainer.tables import column_name, folder_table, read_table

    size = options.size or PHOTOGRAPH_SIZE
    photographs.shape_for(size)
    table = read_table(options.table) if options.table else folder_table(
        options.data, options.attribute or column_name(options.data.resolve().name, 1))
    data = photographs.load_photographs(
        options.data, table, size=size, cache=options.cache or options.out.parent, names=options.attributes,
        scales=dict(options.scale), validation=options.validation, seed=options.seed or 0)
    config = ClassifierConfig(epochs=options.epochs or PHOTOGRAPH_EPOCHS, seed=options.seed or 0,
                              precision=options.precision, device=options.device)
    model = photographs.train_on(data, config, balance=options.balance is not False, mirror=options.mirror,
                                 progress=report)
    model.metadata["data"] = f"{len(data.pictures)} pictures of {options.data.name}"
    photographs.plot(options.out.with_suffix(".confusion.png"), data.attributes, model.metadata["validation"])
    for name, facts in model.metadata["validation"].items():
        for said in facts["warnings"]:
            log.warning("%s: %s", name, said)
    return model


def show(facts: dict, console: Terminal) -> None:
    """The validation report of photographs."""
    if "validation" not in facts:
        return
    table = new_table("validation", "attribute", "accuracy>", "a guess>", "calibration error>", "recall", "precision")
    for name, found in facts["validation"].items():
        if "accuracy" in found:
            lists = [", ".join(f"{key} {value:.2f}" for key, value in found.get(kind, {}).items())
                     for kind in ("recall", "precision")]
            error = f"{found['calibration_error']:.3f}" if "calibration_error" in found else ""
            table.add_row(name, f"{found['accuracy']:.3f}", f"{found['guess']:.3f}", error, *lists)
    console.print(table)


def train_identity(options: argparse.Namespace, report: Report) -> dict:
    from lace_trainer.faces.pictures import portraits
    from lace_trainer.judges import identity

    cache, size = options.cache or options.out.parent, identity.SHAPE.size
    held_out = portraits(options.held_out, options.views, size, identity.HELD_OUT_SEED, cache)
    people = portraits(options.people, options.views, size, identity.PEOPLE_SEED, cache)
    config = identity.IdentityConfig(steps=options.steps, seed=options.seed or 0, precision=options.precision,
                                     device=options.device)
    model = identity.train(people, config, held_out=held_out, progress=report)
    model.metadata |= {"people_seed": identity.PEOPLE_SEED, "held_out_seed": identity.HELD_OUT_SEED}
    identity.save(model, options.out)
    return {"identity": str(options.out), **model.metadata["verification"], "seconds": model.metadata["seconds"]}
