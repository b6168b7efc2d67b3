"""Kill what writes, at all moments, and look: is everything whole?

    python -m benchmarks.kills --kills 500 --out benchmarks/results/kills.json

An action (an export, an overwrite, a training, ...) runs in a child process that is killed with SIGKILL: in half of the
runs after a random time, in the other half at a random operation on files, so that the moments between two renames are
met too. Then the target must be the whole old or the whole new one; the same action must run to its end; and nothing
else may lie beside it afterwards. The moments follow from the seed as far as the machine's speed allows.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

# Threads of the libraries for matrices would not be there in the children, but the locks that they hold would.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
import numpy as np

from engine import disk
from engine.bundle import Bundle
from engine.cli import sample
from engine.errors import LaceError
from engine.folders import recover, write_atomically, writing_folder
from engine.origin import commit, machine, versions

OLD, NEW, ABSENT = "old", "new", "absent"
MARKER = "marker"
# Operations on files that Python reports before it does them. A rename through the C library follows a ctypes.dlsym.
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod",
              "ctypes.dlsym", "shutil.rmtree")
BATCH, PICTURES = 8, 48  # of a training
NAMING = 20  # operations at the end of an action


@dataclass(frozen=True)
class Action:
    """What is killed.

    prepare   puts the old state into a folder
    run       does the action there
    look      says which whole state is there: OLD, NEW, ABSENT; or raises, if it is none
    left      the names in the folder after a run that was not killed
    share     of all kills
    again     the next run, where it is not ``run``
    """

    prepare: Callable[[Path], object]
    run: Callable[[Path], object]
    look: Callable[[Path], str]
    left: tuple[str, ...]
    states: tuple[str, ...] = (OLD, NEW)
    share: int = 5
    again: Callable[[Path], object] | None = None


# --- a tiny world -------------------------------------------------------------------------------------------------


def parts():
    import torch

    from exporter.generators import Facts, Parts
    from exporter.generators.stylegan2 import Mapping, Synthesis

    torch.manual_seed(0)
    mapping = Mapping(16, 16, num_layers=2).eval().requires_grad_(False)
    synthesis = Synthesis(16, {4: 8, 8: 8}).eval().requires_grad_(False)
    return Parts(mapping, synthesis, Facts("tiny", "stylegan2-skip", 16, 16, 0, synthesis.num_ws, 8, 3, "lace-train"))


def head(name: str):
    from exporter.heads import HeadAttribute, HeadStack

    rng = np.random.default_rng(len(name))
    sizes = ((12, 16), (2, 12))
    layers = tuple((rng.normal(size=size).astype(np.float32), np.zeros(size[0], np.float32)) for size in sizes)
    return HeadStack(name, "w", layers, (HeadAttribute(name, "class", ("no", "yes"), (0, 2)),))


def bundle_state(folder: Path) -> str:
    """By the guidance and the heads; opening has checked every file's hash."""
    path = folder / "world.lace"
    if not path.exists() and not any(folder.iterdir()):
        return ABSENT
    try:
        bundle = Bundle(path)
    except LaceError:
        if path.exists():
            raise
        return ABSENT  # an export that was killed before there was anything
    return NEW if bundle.generator.guidance == 2 or "hat" in bundle.heads else OLD


def export_to(folder: Path, guidance: float, overwrite: bool = False) -> None:
    from exporter import export

    export(parts(), [head("smile")], out=folder / "world.lace", guidance=guidance, overwrite=overwrite)


def add_head(folder: Path, name: str) -> None:
    from exporter import export

    export(folder / "world.lace", [head(name)], out=folder / "world.lace", overwrite=True)


# --- small actions ------------------------------------------------------------------------------------------------


def draw(folder: Path, seed: int) -> None:
    arguments = ["demo", "smile", "--count", 2, "--seed", seed, "--out", folder / "out", "--overwrite", "--threads", 1]
    assert sample.main(list(map(str, arguments))) == 0


def drawn_state(folder: Path) -> str:
    names = {"0000.png", "0001.png", "grid.png", "samples.json"}
    assert {path.name for path in (folder / "out").iterdir()} == names
    seeds = [one["seed"] for one in json.loads((folder / "out" / "samples.json").read_text())["samples"]]
    return {(0, 1): OLD, (7, 8): NEW}[tuple(seeds)]


def replace(folder: Path, text: str) -> None:
    with writing_folder(folder / "out", marker=MARKER, overwrite=True, error=LaceError) as partial:
        for name in ("a", "b", MARKER):
            (partial / name).write_text(text)


def replaced_state(folder: Path) -> str:
    recover(folder / "out", MARKER)
    texts = {path.read_text() for path in (folder / "out").iterdir() if not path.name.startswith(".")}
    (text,) = texts
    return text


def without_exchange(folder: Path) -> None:
    """As where the system has no renameat2."""
    with patch.object(disk, "system_call", lambda name: None):
        replace(folder, NEW)


def as_volume(path: str | os.PathLike) -> bool:
    return os.fspath(path).endswith("out")


def into_volume(folder: Path, text: str = NEW) -> None:
    """As where the target is a mount point."""
    with patch.object(os.path, "ismount", as_volume):
        replace(folder, text)


def volume_state(folder: Path) -> str:
    with patch.object(os.path, "ismount", as_volume):
        return replaced_state(folder)


def write_file(folder: Path, text: str) -> None:
    write_atomically(folder / "file", text * 1000)


def file_state(folder: Path) -> str:
    text = (folder / "file").read_text()
    return {OLD * 1000: OLD, NEW * 1000: NEW}[text]


def training():
    from lace_trainer.gan.config import GanConfig

    return GanConfig(z_dim=8, w_dim=8, mapping_layers=2, channels={4: 8, 8: 8}, batch=BATCH, precision="fp32")


def learn(folder: Path, pictures: int = PICTURES) -> None:
    import torch

    from lace_trainer.gan.loop import train

    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8))
    train(training(), data, folder / "run", pictures=pictures, every=1)


def learned_state(folder: Path) -> str:
    """A checkpoint of any step, whole, and a log of whole lines but for its end."""
    from lace_trainer.gan.loop import resumed

    found = resumed(training(), folder / "run" / "checkpoint.pt")
    lines = (folder / "run" / "log.jsonl").read_text().split("\n")[:-1]
    assert all(json.loads(line)["pictures"] % BATCH == 0 for line in lines)
    return NEW if found.pictures == PICTURES else OLD


ACTIONS: dict[str, Action] = {
    "export": Action(lambda folder: None, lambda folder: export_to(folder, 2), bundle_state, ("world.lace",),
                     (ABSENT, NEW), share=1, again=lambda folder: export_to(folder, 2, True)),
    "overwrite a bundle": Action(lambda folder: export_to(folder, 1), lambda folder: export_to(folder, 2, True),
                                 bundle_state, ("world.lace",), share=1),
    "add heads in place": Action(lambda folder: export_to(folder, 1), lambda folder: add_head(folder, "hat"),
                                 bundle_state, ("world.lace",), again=lambda folder: add_head(folder, "scarf")),
    "sample into a folder": Action(lambda folder: draw(folder, 0), lambda folder: draw(folder, 7), drawn_state,
                                   ("out",)),
    "train with checkpoints": Action(lambda folder: learn(folder, BATCH), learn, learned_state, ("run",)),
    "replace a folder": Action(lambda folder: replace(folder, OLD), lambda folder: replace(folder, NEW),
                               replaced_state, ("out",)),
    "replace without renameat2": Action(lambda folder: replace(folder, OLD), without_exchange, replaced_state,
                                        ("out",)),
    "replace within a volume": Action(lambda folder: into_volume(folder, OLD), into_volume, volume_state, ("out",)),
    "replace a file": Action(lambda folder: write_file(folder, OLD), lambda folder: write_file(folder, NEW),
                             file_state, ("file",)),
}


WITH_TORCH = {"export", "overwrite a bundle", "add heads in place", "train with checkpoints"}


# --- killing ------------------------------------------------------------------------------------------------------


def child(work: Callable[[], object], *, quiet: bool = True) -> int:
    """Start ``work`` in a process of its own; its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(os.devnull, "w") as nowhere:
            hidden = (redirect_stdout(nowhere), redirect_stderr(nowhere)) if quiet else (nullcontext(), nullcontext())
            with hidden[0], hidden[1]:
                work()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def finish(work: Callable[[], object]) -> float:
    """Run ``work`` in a process of its own, to its end; the seconds it took."""
    began = time.perf_counter()
    if os.waitpid(child(work), 0)[1]:
        raise SystemExit("an action that nobody killed failed")
    return time.perf_counter() - began


def counting(work: Callable[[], object], at: int | None, told: Path | None = None) -> Callable[[], object]:
    """``work``, killed at its operation number ``at``; with ``told`` their number is written there at the end."""

    def counted() -> None:
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            if event in OPERATIONS:
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()
        if told:
            told.write_text(str(count))

    return counted


def kill(action: Action, folder: Path, rng: random.Random, seconds: float, operations: int) -> str:
    """One kill and what it left; 'finished' where it came too late."""
    if rng.random() < 0.5:
        pid = child(lambda: action.run(folder))
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
    else:
        # The last ones give the names: every second kill is aimed at them.
        at = rng.randint(max(1, operations - NAMING), operations) if rng.random() < 0.5 else rng.randint(1, operations)
        pid = child(counting(lambda: action.run(folder), at))
    _, status = os.waitpid(pid, 0)
    return "killed" if os.WIFSIGNALED(status) else "finished"


def try_action(name: str, kills: int, folder: Path, rng: random.Random) -> dict:
    """``kills`` kills of one action; counts of what was found."""
    action, template, place, state = ACTIONS[name], *(folder / part for part in ("template", "place", "state"))
    template.mkdir(parents=True)
    finish(lambda: action.prepare(template))
    found = {"kills": 0, "too_late": 0, **dict.fromkeys(action.states, 0), "torn": 0, "left_behind": 0, "failed": 0}
    shutil.copytree(template, place)
    seconds = finish(counting(lambda: action.run(place), None, folder / "count"))
    operations = int((folder / "count").read_text())
    while found["kills"] < kills:
        shutil.rmtree(place)
        shutil.copytree(template, place)
        if kill(action, place, rng, seconds, operations) == "finished":
            found["too_late"] += 1
            continue
        found["kills"] += 1
        # In processes of their own: what they open (threads, files) would be inherited by the next that is killed.
        pid = child(lambda: state.write_text(action.look(place)), quiet=False)
        if os.waitpid(pid, 0)[1]:
            found["torn"] += 1
            continue
        found[state.read_text()] += 1
        if os.waitpid(child(lambda: (action.again or action.run)(place)), 0)[1]:
            found["failed"] += 1
        elif sorted(path.name for path in place.iterdir()) != list(action.left):
            found["left_behind"] += 1
    return {**found, "operations": operations, "seconds": seconds}


def import_late(folder: Path) -> None:
    """Export and train once in a child, and import here what that imported: else all would spend their time on it."""
    names = folder / "modules"

    def work() -> None:
        export_to(folder, 1)
        learn(folder, BATCH)
        names.write_text(json.dumps(list(sys.modules)))

    finish(work)
    for name in json.loads(names.read_text()):
        if "onnxruntime" not in name:  # it starts a thread
            with suppress(ImportError):
                import_module(name)
    sys.modules["torch"].set_num_threads(1)


def check_alone() -> None:
    """A child has no copy of its parent's threads, but of the locks that they hold."""
    tasks = Path("/proc/self/task")
    if tasks.exists() and len(list(tasks.iterdir())) > 1:
        raise SystemExit("threads are running that no child would have: the kills would hang")


def good(found: dict) -> bool:
    return not (found["torn"] or found["left_behind"] or found["failed"])


def spread(kills: int, names: Sequence[str]) -> dict[str, int]:
    """{action: kills}, by their shares and together ``kills``."""
    shares = [ACTIONS[name].share for name in names]
    ends = [kills * sum(shares[: i + 1]) // sum(shares) for i in range(len(names))]
    return {name: end - before for name, end, before in zip(names, ends, [0, *ends], strict=False)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.kills", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500, metavar="N", help="over all actions (500)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments (0)")
    parser.add_argument("--only", nargs="+", choices=[*ACTIONS], default=[*ACTIONS], metavar="NAME",
                        help=f"of: {', '.join(ACTIONS)}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the .json file to write")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    rng, began, actions = random.Random(options.seed), time.perf_counter(), {}
    with tempfile.TemporaryDirectory(prefix="lace-kills-") as root:
        if WITH_TORCH & set(ACTIONS) & set(options.only):
            import_late(Path(root))
        check_alone()
        for i, (name, kills) in enumerate(spread(options.kills, options.only).items()):
            if kills:
                actions[name] = try_action(name, kills, Path(root) / str(i), rng)
                print(f"{name}: {actions[name]}", file=sys.stderr)
    body = {
        "benchmark": "kills", "kills": sum(found["kills"] for found in actions.values()), "seed": options.seed,
        "actions": actions, "passed": all(map(good, actions.values())), "seconds": time.perf_counter() - began,
        "machine": machine(), "versions": versions(), "commit": commit(),
    }
    text = json.dumps(body, indent=1) + "\n"
    if options.out:
        write_atomically(options.out, text)
    else:
        sys.stdout.write(text)
    return 0 if body["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
