"""What decides a picture, as a document: written into every PNG and samples.json, and read back for ``--again``.

A PNG comes from strangers: its document is checked field by field, names no file, and runs nothing but a sampler on the
bundle that the user gave.
"""

import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray as Array
from PIL import Image

from engine.bundle import Bundle
from engine.cli.latents import NVIDIA_SEEDS, nvidia_latent
from engine.cli.options import UsageError
from engine.editing import METHODS
from engine.errors import LaceError
from engine.grammar import parse
from engine.origin import versions
from engine.pictures import to_image
from engine.reference.noise import SEED_LIMIT
from engine.requests import MOST_CANDIDATES, MOST_POLISH, Request, Sample
from engine.runtimes import AUTO, RUNTIMES
from engine.sampler import MOST_ROWS, Sampler
from engine.solvers import SOLVERS, make_solver, name_and_settings
from engine.tape import LOGICS
from engine.text import to_json

RECIPE = "Recipe"  # the text chunk that holds the document; the others are for people
FORM = 1
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13", "tensorrt-rtx-cu13")
# A document from a stranger may ask for no more work than this.
MOST_STEPS = 100_000
MOST_EDITS = 1000
MOST_TEXT = 10_000
MOST_TARGETS = 100
MOST_PIXELS = 2**26


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a picture begins: the seed's own latent, NVIDIA's for a seed number, or a latent (width,) of a file."""

    space: str = "z"
    nvidia_seed: int | None = None
    latent: Array | None = None

    def arguments(self, width: int) -> dict[str, Any]:
        """The arguments z or w of a Request."""
        if self.nvidia_seed is not None:
            return {"z": nvidia_latent(self.nvidia_seed, width)}
        return {} if self.latent is None else {self.space: self.latent}

    def document(self) -> dict | None:
        if self.nvidia_seed is not None:
            return {"nvidia_seed": self.nvidia_seed}
        if self.latent is None:
            return None
        return {"space": self.space, "float32": base64.b64encode(self.latent.astype("<f4").tobytes()).decode("ascii")}


@dataclass(frozen=True, slots=True)
class Edit:
    """One stage of an edit: the condition's text and the arguments of ``Sampler.edit``."""

    condition: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides a picture.

    engine     settings of the Sampler, the bundle's hash, and the versions of what ran
    request    condition, seed, truncation, label, steps, guidance, confidence and candidate, as a Request has them;
               the candidate says what a check decided
    start      where it begins;  edits: what was done to it afterwards
    """

    engine: Mapping[str, Any]
    request: Mapping[str, Any]
    start: Beginning = Beginning()
    edits: tuple[Edit, ...] = ()

    def document(self) -> dict:
        edits = [{"condition": edit.condition, **edit.options} for edit in self.edits]
        return {"form": FORM, "engine": dict(self.engine), "request": {**self.request, "start": self.start.document()},
                "edits": edits}


def engine_facts(sampler: Sampler, precision: str | None) -> dict:
    """What is common to all samples of a sampler. ``precision``: the one that was asked for, if any.

    solver   None: the sampler's own choice for each request, of which ``settings`` are the posterior's strength
    """
    posterior, runtime = sampler.starts.posterior, sampler.runtime
    solver, settings = name_and_settings(posterior or sampler.flows.solver)
    if posterior and not sampler.starts.is_strict:
        solver, settings = None, {"confidence": posterior.confidence, "guidance": posterior.guidance}
    return {
        "bundle": sampler.bundle.hash, "generator": sampler.bundle.generator.name, "solver": solver,
        "settings": settings, "logic": sampler.starts.logic, "temperature": sampler.starts.temperature,
        "guidance": sampler.starts.guidance, "runtime": runtime.name, "device": runtime.device, "precision": precision,
        "capacity": sampler.capacity, "versions": versions(PACKAGES),
    }


def request_facts(sample: Sample, sampler: Sampler) -> dict:
    """Condition and settings of a sample's own, as ``Request`` takes them."""
    granted = sampler.starts.plain(sample.request).expression
    return {"condition": None if granted is None else str(granted), **oneshot_facts(sample.request),
            "seed": int(sample.seed), "truncation": float(sampler.starts.asked(sample.request)),
            "label": whole_or_none(sample.request.label), "steps": whole_or_none(sample.request.steps),
            "guidance": float_or_none(sample.request.guidance),
            "confidence": float_or_none(sample.request.confidence), "candidate": int(sample.candidate)}


def oneshot_facts(request: Request) -> dict:
    """The one-pass map that made a sample, if any, as ``Request`` takes it."""
    if request.oneshot is None:
        return {}
    targets = {name: float(target) for name, target in (request.targets or {}).items()}
    return {"oneshot": request.oneshot, "targets": targets or None, "polish": int(request.polish or 0)}


def whole_or_none(number: int | None) -> int | None:
    """An integer of numpy is none of JSON."""
    return None if number is None else int(number)


def float_or_none(number: float | None) -> float | None:
    return None if number is None else float(number)


def chunks(recipe: Recipe) -> dict[str, str]:
    """The text chunks of a PNG: some for people, and the whole document."""
    engine, request = recipe.engine, recipe.request
    confidence = request["confidence"] or engine["settings"].get("confidence")
    return {
        "Software": f"lace-engine {engine['versions']['lace-engine']}",
        "Condition": request["condition"] or "",
        "Seed": str(request["seed"]),
        "Truncation": repr(request["truncation"]),
        "Guidance": repr(request["guidance"] or engine["guidance"]),
        **({"Confidence": repr(confidence)} if confidence else {}),
        "Bundle": engine["bundle"],
        RECIPE: to_json(recipe.document(), indent=None),
    }


# --- back again ---------------------------------------------------------------------------------------------------


def read_recipe(path: Path) -> tuple[Recipe, Array]:
    """The recipe of a PNG and its picture (H, W) or (H, W, 3) uint8. Raises UsageError."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(RECIPE)
            if not isinstance(text, str):
                raise UsageError(f"{path} has no recipe inside: give one of the numbered pictures that lace-sample and "
                                 "lace-edit of version 0.2 or later write")
            recipe = build_recipe(json.loads(text))
            need(image.width * image.height <= MOST_PIXELS, f"it has {image.width} x {image.height} pixels")
            pixels = np.asarray(image)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UsageError:
        raise
    except (LaceError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError, SyntaxError,
            OverflowError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} is no PNG of lace-sample or lace-edit that can be read ({error})") from error
    return recipe, pixels


def build_recipe(document: Any) -> Recipe:
    """Check every field of a document. Raises ValueError, KeyError, TypeError or LaceError."""
    need(isinstance(document, dict) and document["form"] == FORM, f"its recipe is not of form {FORM}")
    engine, request, edits = document["engine"], document["request"], document["edits"]
    need(isinstance(edits, list) and len(edits) <= MOST_EDITS, f"it has more than {MOST_EDITS} edits")
    return Recipe(checked_engine(engine), checked_request(request), checked_start(request["start"]),
                  tuple(checked_edit(edit) for edit in edits))


def checked_engine(facts: Any) -> dict:
    settings = {name: value for name, value in facts["settings"].items() if value is not None}
    need(facts["solver"] is None or facts["solver"] in SOLVERS, "its solver is unknown")
    need(facts["solver"] is not None or set(settings) <= {"confidence", "guidance"}, "its settings have no solver")
    for name, value in settings.items():  # the names are checked where the solver is made
        fits = {"clock": value in ("flow", "paper"), "steps": is_whole(value, 1, MOST_STEPS),
                "max_evaluations": is_whole(value, 1, MOST_STEPS), "corrections": is_whole(value, 0, MOST_STEPS),
                "fresh": is_whole(value, 1, MOST_STEPS)}
        need(fits.get(name, is_number(value, 0, MOST_STEPS)), f"the setting {str(name)[:40]!r} is {repr(value)[:40]}")
    need(facts["logic"] in LOGICS, "its logic is unknown")
    need(facts["runtime"] in RUNTIMES and facts["device"] in AUTO, "its runtime is unknown")
    for name in ("temperature", "guidance"):
        need(is_number(facts[name], 0, 1e6), f"its {name} is no number above 0")
    need(is_whole(facts["capacity"], 1, MOST_ROWS), "its capacity is out of range")
    for name in ("bundle", "generator", "precision"):
        need(is_text(facts[name]) or (name == "precision" and facts[name] is None), f"its {name} is no text")
    table = facts["versions"]
    need(isinstance(table, dict) and all(map(is_text, (*table, *table.values()))), "its versions are no table of texts")
    return {**{name: facts[name] for name in ("bundle", "generator", "solver", "logic", "temperature", "guidance",
                                              "runtime", "device", "precision", "capacity", "versions")},
            "settings": settings}


def checked_request(facts: Any) -> dict:
    need(facts["condition"] is None or is_text(facts["condition"]), "its condition is no text")
    need(is_whole(facts["seed"], 0, SEED_LIMIT - 1), "its seed is out of range")
    need(is_number(facts["truncation"], -1e6, 1e6), "its truncation is no number")
    need(facts["label"] is None or is_whole(facts["label"], 0, 2**31), "its label is no number")
    need(facts["steps"] is None or is_whole(facts["steps"], 1, MOST_STEPS), "its number of steps is out of range")
    need(facts["guidance"] is None or is_number(facts["guidance"], 0, 1e6), "its guidance is no number above 0")
    sure, candidate = facts.get("confidence"), facts.get("candidate", 0)  # which the first documents of this form lack
    need(is_whole(candidate, 0, MOST_CANDIDATES - 1), "its candidate is out of range")
    need(sure is None or is_number(sure, 0, 1), "its confidence is no number between 0 and 1")
    if facts["condition"] is not None:
        parse(facts["condition"])
    return {**{name: facts[name] for name in ("condition", "seed", "truncation", "label", "steps", "guidance")},
            "confidence": sure, "candidate": candidate, **checked_oneshot(facts)}


def checked_oneshot(facts: Any) -> dict:
    if facts.get("oneshot") is None:
        return {}
    targets = facts["targets"]
    need(is_text(facts["oneshot"]), "its one-pass map is no text")
    need(is_whole(facts["polish"], 0, MOST_POLISH), "its polish is out of range")
    need(targets is None or (isinstance(targets, dict) and len(targets) <= MOST_TARGETS
                             and all(is_number(value, -1e9, 1e9) for value in targets.values())),
         "its targets are no table of numbers")
    return {name: facts[name] for name in ("oneshot", "targets", "polish")}


def checked_start(facts: Any) -> Beginning:
    if facts is None:
        return Beginning()
    if "nvidia_seed" in facts:
        need(is_whole(facts["nvidia_seed"], 0, NVIDIA_SEEDS - 1), "its seed number is out of range")
        return Beginning(nvidia_seed=facts["nvidia_seed"])
    need(facts["space"] in ("z", "w"), "its latent is neither z nor w")
    try:
        latent = np.frombuffer(base64.b64decode(facts["float32"], validate=True), "<f4").astype(np.float32)
    except binascii.Error as error:
        raise ValueError("its latent is not in base64") from error
    return Beginning(space=facts["space"], latent=latent)


# Arguments of ``Sampler.edit`` and what they may be.
EDIT_OPTIONS: Mapping[str, Callable[[Any], bool]] = {
    "method": lambda value: value in METHODS,
    "keep": lambda value: value is None or (isinstance(value, list) and all(map(is_text, value))),
    "keep_weight": lambda value: is_number(value, 0, 1e9),
    "near": lambda value: value is None or is_number(value, 0, 1e9),
    "hold": lambda value: isinstance(value, bool),
}


def checked_edit(facts: Any) -> Edit:
    options = {name: value for name, value in facts.items() if name != "condition"}
    for name, value in options.items():
        need(name in EDIT_OPTIONS and EDIT_OPTIONS[name](value), f"an edit's {str(name)[:40]!r} is {repr(value)[:40]}")
    need(is_text(facts["condition"]), "an edit's condition is no text")
    parse(facts["condition"])
    return Edit(facts["condition"], options)


def need(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and (
        low <= value <= high)


def is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MOST_TEXT


def make_sampler(recipe: Recipe, bundle: Bundle, running: Mapping[str, Any]) -> Sampler:
    """A sampler as the recipe says, but for what ``running`` says of runtime, device, precision, capacity, threads."""
    engine = recipe.engine
    # Another runtime has other precisions.
    own = ("device", "capacity") if "runtime" in running else ("runtime", "device", "precision", "capacity")
    chosen = {**{name: engine[name] for name in own if engine[name] is not None}, **running}
    if engine["solver"] is None:
        return Sampler(bundle, **engine["settings"], **chosen)
    return Sampler(bundle, solver=make_solver(engine["solver"], **engine["settings"]), logic=engine["logic"],
                   temperature=engine["temperature"], guidance=engine["guidance"], **chosen)


def draw(recipe: Recipe, sampler: Sampler) -> Sample:
    """The picture of a recipe."""
    # A one-pass map has all else but the seed of its own; the document has it for people.
    of_map = {name: recipe.request[name] for name in ("seed", "oneshot", "targets", "polish") if name in recipe.request}
    facts = of_map if "oneshot" in of_map else recipe.request
    request = Request(**facts, **recipe.start.arguments(sampler.bundle.generator.z_dim))
    sample = sampler.sample([request])[0]
    for edit in recipe.edits:
        sample = sampler.edit(sample, edit.condition, **edit.options)[0]
    return sample


def differences(recipe: Recipe, sampler: Sampler, old: Array, new: Array | None) -> list[str]:
    """What differs between a picture and the one drawn now, in sentences; none if they have the same bits."""
    new = np.asarray(to_image(new))
    if old.shape == new.shape and np.array_equal(old, new):
        return []
    if old.shape != new.shape:
        return [f"the picture has {old.shape} numbers, this one {new.shape}"]
    gap = np.abs(old.astype(int) - new.astype(int))
    found = [f"{np.mean(gap > 0):.2%} of the picture's numbers differ, by at most {gap.max()} of 255"]
    now = engine_facts(sampler, None)
    before, after = ({**facts["versions"], "runtime": facts["runtime"], "device": facts["device"]}
                     for facts in (recipe.engine, now))
    found += [f"{name}: {before.get(name, 'none')} then, {after.get(name, 'none')} now"
              for name in dict.fromkeys((*before, *after)) if before.get(name) != after.get(name)]
    return found
