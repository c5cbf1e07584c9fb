"""docs/images/house.svg: the rooms of the source tree and what each of them imports.

    python tools/house.py            # draw
    python tools/house.py --check    # exit 1 if the drawing is not of today's imports

A room is a package or a module right below ``goldenlayers``. It stands one floor above the highest
room that it imports. Arrows point to what is imported; those that follow from others are left out.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "goldenlayers"
PICTURE = ROOT / "docs" / "images" / "house.svg"
WIDTH, HEIGHT, GAP, FLOOR, MARGIN = 104, 30, 18, 74, 16


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Rooms that a file imports when it runs; what only type checkers see does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{a.name}" for a in node.names] if "." not in module else [module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("goldenlayers.")}
    return found


def house() -> dict[str, set[str]]:
    """Every room with the rooms it imports."""
    rooms: dict[str, set[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        room = room_of(path)
        if room != "__init__":
            rooms.setdefault(room, set()).update(imported(path))
    rooms["cli"].add("commands")  # by name, when one is called
    return {room: {one for one in found if one in rooms} - {room} for room, found in rooms.items()}


def floors(rooms: dict[str, set[str]]) -> dict[str, int]:
    """How high each room stands: 0 where nothing is imported."""
    heights: dict[str, int] = {}

    def height(room: str, above: tuple[str, ...] = ()) -> int:
        if room in above:
            raise SystemExit(f"imports run in a circle: {' -> '.join([*above, room])}")
        if room not in heights:
            below = [height(one, (*above, room)) for one in rooms[room]]
            heights[room] = 1 + max(below, default=-1)
        return heights[room]

    for room in rooms:
        height(room)
    return heights


def direct(rooms: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports that do not follow from others."""

    def all_below(room: str) -> set[str]:
        return (
            set().union(*({one} | all_below(one) for one in rooms[room])) if rooms[room] else set()
        )

    below = {room: all_below(room) for room in rooms}
    return {
        room: {one for one in found if not any(one in below[other] for other in found)}
        for room, found in rooms.items()
    }


def places(rooms: dict[str, set[str]], heights: dict[str, int]) -> dict[str, tuple[float, float]]:
    """The middle of each room: each floor in the order of what it stands on, centred."""
    by_floor: dict[int, list[str]] = {}
    for room, height in heights.items():
        by_floor.setdefault(height, []).append(room)
    widest = max(len(some) for some in by_floor.values())
    width = widest * (WIDTH + GAP) - GAP + 2 * MARGIN
    found: dict[str, tuple[float, float]] = {}
    for height in sorted(by_floor):
        some = by_floor[height]

        def over(room: str) -> tuple[float, str]:
            under = [found[one][0] for one in rooms[room] if one in found]
            return (sum(under) / len(under) if under else 0.0, room)

        some.sort(key=over)
        span = len(some) * (WIDTH + GAP) - GAP
        left = (width - span) / 2
        y = MARGIN + (max(by_floor) - height) * FLOOR + HEIGHT / 2
        for i, room in enumerate(some):
            found[room] = (left + i * (WIDTH + GAP) + WIDTH / 2, y)
    return found


def drawing() -> str:
    """The picture as SVG."""
    rooms = house()
    at = places(rooms, floors(rooms))
    width = max(x for x, _ in at.values()) + WIDTH / 2 + MARGIN
    height = max(y for _, y in at.values()) + HEIGHT / 2 + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="DejaVu Sans, Verdana, sans-serif" font-size="13">',
        "<title>The rooms of goldenlayers and what they import</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
        'markerHeight="6" orient="auto"><path d="M0 0 8 4 0 8z" fill="#7b8794"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for room, below in sorted(direct(rooms).items()):
        x, y = at[room]
        for one in sorted(below):
            to_x, to_y = at[one]
            top, bottom = y + HEIGHT / 2, to_y - HEIGHT / 2
            bend = (bottom - top) / 2
            lines.append(
                f'<path d="M{x:.0f} {top:.0f}C{x:.0f} {top + bend:.0f} {to_x:.0f} '
                f'{bottom - bend:.0f} {to_x:.0f} {bottom:.0f}" fill="none" stroke="#7b8794" '
                'stroke-width="1.1" opacity=".7" marker-end="url(#tip)"/>'
            )
    for room, (x, y) in sorted(at.items()):
        fill = "#fdf3d8" if (SOURCE / room).is_dir() else "#eef2f6"
        left, top = x - WIDTH / 2, y - HEIGHT / 2
        lines += [
            f'<rect x="{left:.0f}" y="{top:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6" '
            f'fill="{fill}" stroke="#52606d"/>',
            f'<text x="{x:.0f}" y="{y + 4.5:.0f}" text-anchor="middle">{escape(room)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the house from its imports.")
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    now = drawing()
    if not check:
        PICTURE.write_text(now, encoding="utf-8")
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != now:
        print("docs/images/house.svg is out of date: python tools/house.py")
        sys.exit(1)


if __name__ == "__main__":
    main()
