"""The losses and learning rates of runs as an SVG: python train.py plot RUN [RUN …] [--output=FILE]."""

import math
import re
from html import escape
from pathlib import Path

from data import files
from data.cli import InputError, say

WIDTH, LOWER, LEFT, RIGHT, TOP, GAP = 840, 130, 70, 20, 30, 50  # pixels

def read_metrics(run):
    """The lines of a run's metrics.jsonl, of each only what is needed here: a long run has a million of them."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{run} has no metrics.jsonl; expected the folder of a run, such as runs/stories")
    needed = ("step", "train_loss", "val_loss", "lr", "skipped")
    return [{key: line[key] for key in needed if key in line} for line in files.json_lines(path)]

def series(lines, key):
    """The points (step, value) of one quantity."""
    is_finite = lambda value: isinstance(value, (int, float)) and abs(value) < 1e30
    return [(line["step"], line[key]) for line in lines if is_finite(line.get(key))]

def has_losses(lines):
    """Whether there is something of a run to draw."""
    return bool(series(lines, "train_loss") or series(lines, "val_loss"))

def ticks(low, high, count=5):
    """Round numbers between two bounds, about `count` of them."""
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= rough)
    return [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]

def visible(points, steps):
    """No more points of a curve than can be seen: of each column of pixels the lowest and the highest."""
    columns, value = {}, lambda point: point[1]
    for step, loss in points:
        columns.setdefault(step * WIDTH // steps, []).append((step, loss))
    return [point for column in columns.values() for point in sorted({min(column, key=value), max(column, key=value)})]

def panel(curves, marks, top, height, title, steps):
    """One diagram over steps, as SVG elements. curves: [(color, dash, points)], marks: [(color, point)]."""
    values = [value for _, _, points in curves for _, value in points]
    low, high = (min(values), max(values)) if values else (0, 1)
    low, high = (low, high) if high > low else (low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1))
    x = lambda step: LEFT + (WIDTH - LEFT - RIGHT) * step / steps
    y = lambda value: top + height * (high - value) / (high - low)
    middle = top + height / 2
    out = [f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - RIGHT}" height="{height}" fill="none" stroke="#888"/>',
           f'<text x="16" y="{middle}" transform="rotate(-90 16 {middle})" text-anchor="middle">{title}</text>',
           f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{top + height + 34}" text-anchor="middle">step</text>']
    for value in ticks(low, high):
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
                   f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step in ticks(0, steps, 8):
        out.append(f'<text x="{x(step):.1f}" y="{top + height + 16}" text-anchor="middle">{step:g}</text>')
    for color, dash, points in curves:
        line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in visible(points, steps))
        out.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5" '
                   f'stroke-dasharray="{dash}"/>')
    for color, (step, value) in marks:
        out.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="4" fill="{color}"/><text x="{x(step):.1f}" '
                   f'y="{y(value) - 8:.1f}" text-anchor="middle" fill="{color}">{value:.4g} at {step}</text>')
    return out

def svg_of(runs):
    """The SVG of runs, {name: lines of metrics}: losses above, learning rates below."""
    steps = max(1, *(line["step"] for lines in runs.values() for line in lines))
    losses, best, rates, legend = [], [], [], []
    for i, (name, lines) in enumerate(runs.items()):
        color = f"hsl({(210 + 137.5 * i) % 360:g}, 65%, 42%)"  # hues apart by the golden angle, however many
        name = re.sub("[^\t -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", str(name))
        losses += [(color, "1 2", series(lines, "train_loss")), (color, "", series(lines, "val_loss"))]
        best += [(color, point) for point in sorted(series(lines, "val_loss"), key=lambda point: point[1])[:1]]
        rates.append((color, "", series(lines, "lr")))
        what = "validation (line), training (dots)" if has_losses(lines) else "no losses"
        legend.append(f'<text x="{WIDTH - RIGHT - 10}" y="{TOP + 20 + 18 * i}" text-anchor="end" fill="{color}">'
                      f'{escape(name)}: {what}</text>')
    upper = max(300, 20 + 18 * len(runs))  # the legend stands within it
    height = TOP + upper + LOWER + 2 * GAP
    body = panel(losses, best, TOP, upper, "loss, nats per token", steps)
    body += panel(rates, [], TOP + upper + GAP, LOWER, "learning rate", steps)
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
                      'font-family="sans-serif" font-size="12">',
                      f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>', *body, *legend, "</svg>"])

def plot(*runs, output: str = None):
    """Draw the losses and learning rates of runs into an SVG that a browser opens: python train.py plot RUN [RUN …].

    output: the file to write [loss.svg in the first run's folder]
    """
    if not runs:
        raise InputError("no run given; write python train.py plot runs/NAME")
    lines = {run: read_metrics(run) for run in runs}
    if not any(map(has_losses, lines.values())):
        advice = "wait for the first steps"
        if all(any("skipped" in line for line in of_run) for of_run in lines.values()):
            advice = "no step could be applied so far; if none can, start anew with a smaller --lr_max"
        raise InputError(f"{', '.join(map(str, runs))}: there are no losses to draw; {advice}")
    path = Path(runs[0]) / "loss.svg" if output is None else Path(output)
    files.check_output(path, b"<svg")
    with files.beside(path) as partial:
        partial.write_text(svg_of(lines), encoding="utf-8", errors="replace")
    say(f"wrote {path}")
