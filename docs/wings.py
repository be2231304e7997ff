"""The house as a picture, drawn from its imports: `python docs/wings.py` writes docs/wings.svg.

A room is a wing (a folder of the package) or a file on top. It stands above every room that it imports from. Where it imports from two
of which one imports from the other, only the line to the upper one is drawn.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "autosloth"
# How far to the right a room is drawn, from 0 to 1, so that lines pass beside others; a room that is not named stands in the middle.
ACROSS = {"check": 0.9, "publish": 0.45, "training": 0.2, "proof": 0.22, "export": 0.22, "data": 0.71, "models": 0.4}
ACROSS |= {
    "demo": 0.2,
    "weights": 0.47,
    "notebook": 0.9,
    "run": 0.55,
    "settings": 0.45,
    "hub_client": 0.12,
    "retries": 0.2,
    "child_process": 0.8,
    "values": 0.32,
}
ACROSS |= {
    "output": 0.82,
    "errors": 0.2,
    "hardware": 0.55,
    "distributed": 0.82,
    "roads": 0.4,
    "cli": 0.615,
    "commands": 0.62,
    "score": 0.525,
}
PAPER, INK, GREEN, GREY = "#ffffff", "#1f2933", "#2f7d4f", "#9aa5b1"


def room_of(path: Path) -> str:
    """The room that a file of the package stands in."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_from(path: Path) -> list[tuple[str, ...]]:
    """What a file imports from within the package, wherever it does, as dotted paths: `("models",)` or `("models", "engine")`."""
    folder, found = path.relative_to(PACKAGE).parent.parts, []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            names = [node.module] if node.module else [name.name for name in node.names]
            found += [(*base, *name.split(".")) for name in names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("autosloth."):
            found.append(tuple(node.module.split(".")[1:]))
    return found


@functools.cache
def imports() -> dict[str, frozenset[str]]:
    """Each room, and those that it imports from."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if not (room := room_of(path)).startswith("__"):
            found.setdefault(room, set()).update(first for first, *_ in imported_from(path) if first != room)
    return {room: frozenset(others) for room, others in found.items()}


@functools.cache
def level(room: str) -> int:
    """How many rooms stand below it, one upon another."""
    return 1 + max((level(other) for other in imports()[room]), default=-1)


@functools.cache
def reached(room: str) -> frozenset[str]:
    """All rooms that this one imports from, by way of others too."""
    return imports()[room].union(*(reached(other) for other in imports()[room]))


def drawn(room: str) -> list[str]:
    """The rooms that a line is drawn to: those that it comes to by no detour."""
    return sorted(o for o in imports()[room] if not any(o in reached(other) for other in imports()[room] - {o}))


def label(room: str) -> str:
    """The room's name and, of a wing, those of its files."""
    files = sorted(path.stem for path in (PACKAGE / room).glob("*.py") if not path.stem.startswith("__"))
    rows = [", ".join(files[start : start + 3]) for start in range(0, len(files), 3)]
    return "\n".join([f"{room}/" if files else f"{room}.py", *rows])


def draw(target: Path) -> None:
    """Draw rooms and lines; the same imports give the same bytes."""
    import matplotlib

    matplotlib.rcParams.update({"svg.hashsalt": "autosloth", "svg.fonttype": "none", "font.family": "sans-serif"})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.82 * (1 + max(map(level, imports())))), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(-0.5, 0.5 + max(map(level, imports()))))
    axes.axis("off")
    places = {room: (ACROSS.get(room, 0.5), level(room)) for room in sorted(imports())}
    for room, place in places.items():
        for other in drawn(room):
            axes.plot(*zip(place, places[other], strict=True), color=GREY, linewidth=0.9, zorder=1)
        wing = (PACKAGE / room).is_dir()
        box = {
            "facecolor": "#eef6f0" if wing else PAPER,
            "edgecolor": GREEN if wing else GREY,
            "boxstyle": "round,pad=0.4",
        }
        axes.text(*place, label(room), ha="center", va="center", fontsize=8, color=INK, bbox=box, zorder=2)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    draw(PACKAGE.parent / "docs" / "wings.svg")
