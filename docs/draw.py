"""Draws the README's two explanations: python docs/draw.py writes idea.svg and layer.svg.

Needs matplotlib, as benchmarks/requirements.txt does.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "draw", "font.size": 11}
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).resolve().parent
COLORS = ("#4c78a8", "#f58518", "#54a24b")
LIGHT = ("#c6d6ea", "#fbd7b0", "#c5e3c1")


def canvas(width: float, height: float):
    """A white figure in units of its own, without axes."""
    fig, ax = plt.subplots(figsize=(10, 10 * height / width), facecolor="white")
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    fig.subplots_adjust(0, 0, 1, 1)
    return fig, ax


def arrow(ax, start, end, color="black", both=False) -> None:
    style = "<|-|>" if both else "-|>"
    ax.add_patch(FancyArrowPatch(
        start, end, arrowstyle=style, mutation_scale=14, color=color, linewidth=1.6, shrinkA=0,
        shrinkB=0,
    ))  # fmt: skip


def idea() -> None:
    """Six ranks: TP cuts a weight in three, FSDP cuts each part in two."""
    fig, ax = canvas(20, 11.2)

    def text(x, y, words, **style):
        ax.text(x, y, words, **({"ha": "center", "va": "center"} | style))

    text(1.9, 10.5, "a weight matrix", weight="bold")
    text(1.9, 9.95, "(rows: output features)", size=9)
    ax.add_patch(Rectangle((0.9, 3.2), 2, 6, facecolor="#dddddd", edgecolor="black"))
    arrow(ax, (3.1, 6.2), (4.5, 6.2))
    text(3.8, 6.6, "TP", weight="bold")
    text(5.6, 10.5, "three TP shards", weight="bold")
    text(5.6, 9.95, "one for each tp rank", size=9)
    for i in range(3):
        y = 7.2 - 2 * i
        ax.add_patch(Rectangle((4.6, y), 2, 2, facecolor=COLORS[i], edgecolor="black"))
        text(5.6, y + 1, f"tp {i}", color="white", weight="bold")
    arrow(ax, (6.8, 6.2), (8.2, 6.2))
    text(7.5, 6.6, "FSDP", weight="bold")
    text(13.9, 10.5, "what each of the 6 ranks keeps: half of its TP shard", weight="bold")
    for dp in range(2):
        y = 6.5 - 4.3 * dp
        text(8.95, y + 1.1, f"dp {dp}", weight="bold")
        text(8.95, y + 0.55, f"sequences\n{'0 and 1' if dp == 0 else '2 and 3'}", size=8, va="top")
        for tp in range(3):
            x = 10.2 + 3.3 * tp
            ax.add_patch(FancyBboxPatch(
                (x, y - 0.55), 2.5, 3.2, boxstyle="round,pad=0.05", facecolor="white",
                edgecolor="black",
            ))  # fmt: skip
            text(x + 1.25, y + 2.3, f"rank {3 * dp + tp}", weight="bold")
            for half in range(2):
                mine = half == dp
                ax.add_patch(Rectangle(
                    (x + 0.25, y + 0.75 - half), 2, 1, facecolor=COLORS[tp] if mine else "white",
                    edgecolor=COLORS[tp], linestyle="-" if mine else "--",
                ))  # fmt: skip
            text(x + 1.25, y + (1.25 if dp == 0 else 0.25), "kept", size=9, color="white")
    for tp in range(3):
        x = 11.45 + 3.3 * tp
        arrow(ax, (x, 5.9), (x, 4.9), COLORS[tp], both=True)
    column = (
        "a column, such as ranks 0 and 3, holds the same TP shard: FSDP all-gathers its\n"
        "two halves just before a layer runs, frees them after it, and reduce-scatters\n"
        "the gradient in the backward pass"
    )
    row = (
        "a row, such as ranks 0, 1 and 2, works\non the same sequences: TP all-gathers and\n"
        "reduce-scatters activations inside each layer"
    )
    text(14.75, 0.75, column, size=9.5)
    text(4.0, 1.6, row, size=9.5)
    fig.savefig(HERE / "idea.svg", metadata={"Date": None})


def layer() -> None:
    """One decoder layer on one tp rank, with local shapes and collectives."""
    fig, ax = canvas(20.4, 8)

    def box(x, y, width, label, color, shape=""):
        ax.add_patch(FancyBboxPatch(
            (x, y), width, 1.1, boxstyle="round,pad=0.04", facecolor=color, edgecolor="black",
        ))  # fmt: skip
        ax.text(x + width / 2, y + 0.55, label, ha="center", va="center", size=10)
        ax.text(x + width / 2, y - 0.42, shape, ha="center", va="center", size=9)

    def block(y, name, norm, first, middle, last, cut):
        ax.text(0.2, y + 1.85, name, weight="bold")
        steps = [
            (1.9, norm, LIGHT[2], "(B, S/T, D)"),
            (1.9, "all-gather", "white", "(B, S, D)"),
            (3.0, first, LIGHT[0], f"(B, S, {cut}/T)"),
            (2.3, middle, LIGHT[0], f"(B, S, {cut}/T)"),
            (1.9, last, LIGHT[1], "partial (B, S, D)"),
            (2.4, "reduce-scatter", "white", "(B, S/T, D)"),
        ]
        x = 1.6
        ax.text(0.75, y + 0.55, "(B, S/T, D)", size=9, ha="center", va="center")
        for i, (width, label, color, shape) in enumerate(steps):
            box(x, y, width, label, color, shape)
            if i + 1 < len(steps):
                arrow(ax, (x + width + 0.02, y + 0.55), (x + width + 0.78, y + 0.55))
            x += width + 0.8
        arrow(ax, (x - 0.78, y + 0.55), (x - 0.1, y + 0.55))
        ax.text(x + 0.05, y + 0.52, "+", size=16, ha="center", va="center", weight="bold")
        over = ([0.75, 0.75, x + 0.05], [y + 0.9, y + 1.6, y + 1.6])
        ax.plot(*over, color="gray", linewidth=1.6)
        arrow(ax, (x + 0.05, y + 1.62), (x + 0.05, y + 0.8), "gray")
        ax.text(x / 2, y + 1.75, "residual stream, cut along S", color="gray", ha="center", size=9)

    block(5.2, "attention", "norm", "q_proj k_proj v_proj", "attention", "o_proj", "H")
    block(1.3, "MLP", "norm", "gate_proj up_proj", "SiLU, product", "down_proj", "F")
    legend = [
        (LIGHT[0], "output features cut"), (LIGHT[1], "input features cut"),
        (LIGHT[2], "whole on every rank"), ("white", "collective over tp"),
    ]  # fmt: skip
    for i, (color, label) in enumerate(legend):
        ax.add_patch(Rectangle((1.6 + 4.7 * i, 0.1), 0.4, 0.35, facecolor=color, edgecolor="black"))
        ax.text(2.15 + 4.7 * i, 0.27, label, va="center", size=9)
    fig.savefig(HERE / "layer.svg", metadata={"Date": None})


if __name__ == "__main__":
    idea()
    layer()
